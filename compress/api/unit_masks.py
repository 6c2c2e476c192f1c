"""One value per unit of a model: learned masks, or scores to rank units by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from compress.surgery.mask_files import holds_scores, read_masks, write_masks


@dataclass(frozen=True)
class Masks:
    """One value per unit of each masked axis, [units] in float32 on the CPU.

    Axes are named ``hidden``, ``layer.N.heads``, ``layer.N.ffn`` and so on. ``scored`` is true for scores to rank units
    by, false for learned masks, which :func:`prune` can also multiply into the weights.
    """

    values: Mapping[str, Tensor]
    scored: bool

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, as a recipe's ``learn_masks`` stage leaves it."""
        write_masks(path, self.values, scores=self.scored)

    @classmethod
    def load(cls, path: str | Path) -> Masks:
        """Read a file that :meth:`save` or a ``learn_masks`` stage wrote."""
        return cls(read_masks(path), holds_scores(path))
