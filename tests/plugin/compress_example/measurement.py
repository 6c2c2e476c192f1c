"""A measurement: how many weights are exactly zero."""

from collections.abc import Mapping
from typing import Any, Literal

from rich.console import Console

from compress.artifact import Artifact
from compress.data import Data
from compress.measure.measurement import Measurement


class Sparsity(Measurement):
    """The share of weights that are exactly zero, of torch models."""

    type: Literal["sparsity"] = "sparsity"

    def run(
        self, artifacts: Mapping[str, Artifact], *, data: Data | None, device: str, console: Console | None
    ) -> dict[str, dict[str, Any]]:
        """Return one record per artifact."""
        return {name: {"sparsity": _zeros(artifact)} for name, artifact in self.chosen(artifacts).items()}


def _zeros(artifact: Artifact) -> float:
    weights = list(artifact.model().parameters())
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
