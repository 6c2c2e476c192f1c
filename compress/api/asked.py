"""Arguments that all training functions share: data, how it is read, and how to train."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from compress.api.arguments import configured, refuse_idle, require_flag, require_seed
from compress.data import Split
from compress.engine.models import device_of
from compress.engine.rows import as_split, require_block_read
from compress.errors import UserError
from compress.training.config import TrainConfig
from compress.training.loop import Place


@dataclass(frozen=True)
class Asked:
    """Data, tokenizer, block, seed, progress and training settings, as the caller gave them.

    Raises UserError for an invalid ``seed`` or ``progress``.
    """

    data: Any
    tokenizer: Any
    block: int | None
    seed: int
    progress: bool
    training: Mapping[str, Any]

    def __post_init__(self) -> None:
        require_seed(self.seed)
        require_flag(self.progress, "progress")

    def rows(self, model: Any) -> Split:
        """Return the data as rows for this model."""
        split = as_split(self.data, model.config, self.tokenizer, name="data", block=self.block)
        if self.block is not None:
            require_block_read(split, self.data)
        return split

    def config(self, idle: Mapping[str, str]) -> TrainConfig:
        """Return the training settings, which must ask for at least one step.

        Raises UserError for a setting that is wrong, and for one that would change nothing; ``idle`` says why.
        """
        config: TrainConfig = configured(TrainConfig, **self.training)
        if self.training.get("keep") == "last":  # the only possibility without evaluation data, so no contradiction
            idle = {name: reason for name, reason in idle.items() if name != "keep"}
        refuse_idle(self.training, idle)
        if config.steps == 0:
            raise UserError("steps: is 0, and nothing would be trained; allowed: whole numbers from 1")
        return config

    def place(self, model: nn.Module, name: str) -> Place:
        """Return the place to train: the device of the model, without a directory for checkpoints."""
        return Place(None, device=device_of(model), seed=self.seed, bar=self.progress, name=name)


def idle_settings(
    *, weights: bool = False, masks: bool = False, scales: bool = False, parts: bool = False, judged: bool = False
) -> dict[str, str]:
    """Return a dict from each training setting that would change nothing to the reason.

    Args:
        weights: whether weights of the model train.
        masks: whether masks train.
        scales: whether scales of quantizers train.
        parts: whether parts of terms train, such as projections.
        judged: whether there is data to evaluate on.
    """
    found = {"checkpoint_every": "a model in memory writes no checkpoints"}
    if not weights:
        found |= dict.fromkeys(("lr", "weight_decay"), "the weights of the model do not train")
    if not masks:
        found["mask_lr"] = "no mask trains"
    if not scales:
        found["scale_lr"] = "the model has no scales that train"
    if not parts:
        found["projection_lr"] = "no term has parts that train"
    if not judged:
        found |= dict.fromkeys(("eval_every", "keep"), "there is no data to evaluate on")
    if not (weights or masks or scales or parts):
        found |= dict.fromkeys(("betas", "schedule", "warmup", "clip"), "nothing trains while gradients are summed")
    return found
