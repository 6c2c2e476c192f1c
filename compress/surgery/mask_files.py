"""Files of masks: learned masks, or scores that rank the units of a model whose masks are all 1."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor


def write_masks(file: str | Path, values: Mapping[str, Tensor], *, scores: bool) -> None:
    """Write a dict from axis (prunable dimension) name to one value per unit, [units], in float32."""
    state = {axis.replace(".", "/"): value.detach().cpu().float().contiguous() for axis, value in values.items()}
    save_file(state, file, metadata={"holds": "scores" if scores else "masks"})


def read_masks(file: str | Path) -> dict[str, Tensor]:
    """Read a dict from axis (prunable dimension) name to one value per unit, [units], in float32."""
    return {name.replace("/", "."): values for name, values in load_file(file).items()}


def holds_scores(file: str | Path) -> bool:
    """Return whether the values are scores rather than learned masks."""
    with safe_open(file, framework="pt") as opened:
        return (opened.metadata() or {}).get("holds") == "scores"
