"""How a stage trains: the config a recipe holds, and the learning rates and parameter groups that follow from it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from accelerate.tracking import get_available_trackers
from pydantic import Field, field_validator, model_validator
from torch import nn

from compress.registry import suggest
from compress.schema import Strict

Group = Literal["weights", "masks", "scales", "projections"]
Decay = Annotated[float, Field(ge=0, lt=1)]


class TrainConfig(Strict):
    """How a stage trains. Give ``steps`` or ``epochs``; a step updates on ``batch`` x ``accumulate`` sequences."""

    steps: int | None = Field(None, ge=0)
    epochs: float | None = Field(None, gt=0)
    batch: int = Field(16, ge=1)
    """Sequences per forward and backward pass. The processes of a run share them."""
    accumulate: int = Field(1, ge=1)
    lr: float = Field(1e-4, ge=0)
    mask_lr: float = Field(1e-2, ge=0)
    scale_lr: float = Field(2e-4, ge=0)
    projection_lr: float = Field(1e-3, ge=0)
    weight_decay: float = Field(0.01, ge=0)
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: float = Field(0.05, ge=0, lt=1)
    """Share of the steps over which the learning rate rises linearly from zero."""
    clip: float | None = Field(1.0, gt=0)
    precision: Literal["bf16", "fp32"] = "bf16"
    """Precision of matrix products, in training and in the evaluations that choose a checkpoint. Parameters and losses
    are float32, and so is everything that a recipe's ``measure`` does."""
    dropout: float | None = Field(None, ge=0, lt=1)
    """Dropout of the student while it trains. The default is the value in its config."""
    eval_every: int | None = Field(None, ge=1)
    """Steps between evaluations. By default a stage evaluates ten times."""
    keep: Literal["best", "last"] = "best"
    """Which weights the stage keeps: the best on ``data.eval`` (the last without ``data.eval``), or the last."""
    checkpoint_every: int | None = Field(None, ge=1)
    """Steps between checkpoints. By default each evaluation writes one."""
    trackers: tuple[str, ...] = ()
    """Names that Accelerate knows, such as ``tensorboard`` or ``wandb``; each must be installed."""

    @model_validator(mode="after")
    def _one_length(self) -> TrainConfig:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either steps or epochs")
        return self

    @field_validator("trackers")
    @classmethod
    def _installed(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        installed = [tracker.value for tracker in get_available_trackers()]
        for name in names:
            if name not in installed:
                raise ValueError(f"{name!r} is not installed. {suggest(name, installed)}")
        return names

    def total(self, rows: int) -> int:
        """Return the total number of updates for a split of ``rows`` sequences."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return max(1, round(self.epochs * rows / (self.batch * self.accumulate)))


def lr_factor(step: int, total: int, config: TrainConfig) -> float:
    """Return the share of the peak learning rate at update ``step`` (from 0): linear warm-up, then the schedule."""
    warmup = round(config.warmup * total)
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(total - warmup, 1)
    return {"linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done)), "constant": 1.0}[config.schedule]


def parameter_groups(groups: Mapping[Group, Sequence[nn.Parameter]], config: TrainConfig) -> list[dict[str, Any]]:
    """AdamW groups, each with its learning rate. Only weight matrices decay, not masks, scales, biases or norms."""
    rates = {
        "weights": config.lr,
        "masks": config.mask_lr,
        "scales": config.scale_lr,
        "projections": config.projection_lr,
    }
    built = []
    for name, parameters in groups.items():
        for decayed in (True, False):
            chosen = [p for p in parameters if p.requires_grad and (name == "weights" and p.ndim > 1) == decayed]
            if chosen:
                decay = config.weight_decay if decayed else 0.0
                built.append({"params": chosen, "lr": rates[name], "peak": rates[name], "weight_decay": decay})
    return built
