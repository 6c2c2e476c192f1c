"""What every function that trains takes: data, how it is read, and how to train."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from compress.api.arguments import configured
from compress.data import Split
from compress.engine.models import device_of
from compress.engine.rows import as_split
from compress.errors import UserError
from compress.training.config import TrainConfig
from compress.training.loop import Place


@dataclass(frozen=True)
class Asked:
    """What every function that trains takes: data, how it is read, and how to train."""

    data: Any
    tokenizer: Any
    block: int | None
    seed: int
    progress: bool
    training: Mapping[str, Any]

    def rows(self, model: Any) -> Split:
        """The data as rows for this model."""
        return as_split(self.data, model.config, self.tokenizer, name="data", block=self.block)

    def config(self) -> TrainConfig:
        """The training settings, of which at least one step must follow."""
        config: TrainConfig = configured(TrainConfig, **self.training)
        if config.steps == 0:
            raise UserError("steps: is 0, and nothing would be trained; allowed: whole numbers from 1")
        return config

    def place(self, model: nn.Module, name: str) -> Place:
        """The device of the model, and no directory."""
        return Place(None, device=device_of(model).type, seed=self.seed, bar=self.progress, name=name)
