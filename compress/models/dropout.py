"""Dropout of a stock model while it trains, restored afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

FUNCTIONAL = ("dropout", "activation_dropout")
"""Attributes that stock modules hand to ``torch.nn.functional.dropout``."""

SKIPPING = "layerdrop"
"""Attribute with the probability that a stock stack skips a whole layer."""


@contextmanager
def set_dropout(model: nn.Module, p: float | None) -> Iterator[None]:
    """Use dropout ``p`` everywhere in ``model`` inside the context; None leaves the model's own.

    0 drops nothing, whole layers included; any other ``p`` leaves their probability alone, which is of another kind.
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
