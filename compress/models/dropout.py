"""Dropout of a transformers model while it trains, restored afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

FUNCTIONAL = ("dropout", "activation_dropout", "attention_dropout")
"""Attributes of transformers modules that hold a dropout probability for a functional call."""

SKIPPING = "layerdrop"
"""Attribute with the probability that a stack (encoder or decoder) of a transformers model skips a whole layer."""


@contextmanager
def set_dropout(model: nn.Module, p: float | None) -> Iterator[None]:
    """Use dropout ``p`` everywhere in ``model`` inside the context. None keeps the model's own dropout.

    With ``p`` = 0, nothing is dropped and no layer is skipped. Any other ``p`` does not change the probability of
    skipping a layer, because that is a different quantity.
    """
    places: list[tuple[nn.Module, str, float]] = []
    for module in model.modules():
        names = ("p",) if isinstance(module, nn.Dropout) else FUNCTIONAL if p else (*FUNCTIONAL, SKIPPING)
        places += [(module, name, v) for name in names if isinstance(v := getattr(module, name, None), int | float)]
    if p is not None:
        for module, name, _ in places:
            setattr(module, name, p)
    try:
        yield
    finally:
        for module, name, value in places:
            setattr(module, name, value)
