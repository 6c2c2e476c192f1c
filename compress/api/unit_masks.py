"""One value per unit (head, FFN neuron, hidden dimension) of a model: learned masks, or scores to rank units by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from compress.api.arguments import require_flag, require_path
from compress.errors import UserError
from compress.files import require_whole
from compress.surgery.mask_files import holds_scores, read_masks, write_masks


@dataclass(frozen=True)
class Masks:
    """One value per unit of each masked axis (prunable dimension), as float32 tensors on the CPU.

    Axes are named ``hidden``, ``layer.N.heads``, ``layer.N.ffn`` and so on. ``scored`` is true for scores to rank units
    by, false for learned masks, which :func:`prune` can also multiply into the weights.

    Raises UserError unless ``values`` is a dict from axis name to a tensor of one dimension.
    """

    values: Mapping[str, Tensor]
    scored: bool

    def __repr__(self) -> str:
        sizes = ", ".join(f"{axis}: {value.numel()}" for axis, value in self.values.items())
        return f"Masks({{{sizes}}}, scored={self.scored})"

    def __post_init__(self) -> None:
        require_flag(self.scored, "scored")
        if not isinstance(self.values, Mapping):
            raise UserError(f"values: expected a mapping of axis names to tensors, got {type(self.values).__name__}")
        for axis, value in self.values.items():
            if not isinstance(axis, str) or not isinstance(value, Tensor) or value.ndim != 1 or not value.numel():
                raise UserError(f"values[{axis!r}]: expected a tensor with one value per unit, got {_described(value)}")

    def save(self, path: str | Path) -> None:
        """Write the masks to a safetensors file, in the format of a recipe's ``learn_masks`` stage.

        Args:
            path: the file; its directory must exist.

        Raises:
            UserError: the file cannot be written.

        Examples:
            >>> masks = compress.score(model)
            >>> masks.save(directory / "masks.safetensors")
            >>> compress.Masks.load(directory / "masks.safetensors").scored
            True
        """
        file = require_path(path, "path")
        try:
            write_masks(file, self.values, scores=self.scored)
        except (OSError, SafetensorError) as error:
            raise UserError(f"path: {file} cannot be written ({error})") from None

    @classmethod
    def load(cls, path: str | Path) -> Masks:
        """Read a file that :meth:`save` or a ``learn_masks`` stage wrote.

        Args:
            path: the file.

        Returns:
            The masks, in float32 on the CPU.

        Raises:
            UserError: the file does not exist or contains no masks.
        """
        file = require_path(path, "path")
        try:
            require_whole(file)
        except ValueError as error:
            raise UserError(f"path: {file} is not a file of masks: {error}") from None
        return cls(read_masks(file), holds_scores(file))


def _described(value: Any) -> str:
    return f"tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
