"""Rotary positions of stock models as tables of cosines and sines."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import ModelError

LENGTH_DEPENDENT = ("dynamic", "longrope")
"""Kinds of rotary positions whose frequencies change with the length of the text."""


def is_rotary(module: nn.Module) -> bool:
    """True for a module that holds the frequencies of rotary positions."""
    return isinstance(getattr(module, "inv_freq", None), Tensor)


def rotary_tables(module: Any) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position, each [context, head size / 2] in float32.

    Row p holds s cos(p f) or s sin(p f) for the frequencies f of the module and its ``attention_scaling`` s, computed
    as the stock module computes them (Su et al. 2021, arXiv 2104.09864).

    Raises:
        ModelError: the frequencies depend on the length of the text, so no table holds them.
    """
    kind = module.rope_type
    if kind in LENGTH_DEPENDENT:
        raise ModelError(f"rope_type {kind!r} cannot be exported: its frequencies depend on the length of the text")
    positions = torch.arange(module.max_seq_len_cached, dtype=torch.float32)
    angles = torch.outer(positions, module.inv_freq.detach().float().cpu())
    return angles.cos() * module.attention_scaling, angles.sin() * module.attention_scaling
