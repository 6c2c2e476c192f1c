"""Dropout of a stock model while it trains, restored afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

FUNCTIONAL = ("dropout", "activation_dropout")
"""Attributes that stock modules hand to ``torch.nn.functional.dropout``."""


@contextmanager
def set_dropout(model: nn.Module, p: float | None) -> Iterator[None]:
    """Use dropout ``p`` everywhere in ``model`` inside the context; None leaves the model's own."""
    places: list[tuple[nn.Module, str, float]] = []
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            places.append((module, "p", module.p))
        else:
            places += [(module, n, v) for n in FUNCTIONAL if isinstance(v := getattr(module, n, None), float)]
    if p is not None:
        for module, name, _ in places:
            setattr(module, name, p)
    try:
        yield
    finally:
        for module, name, value in places:
            setattr(module, name, value)
