"""One update: the gradient over all batches and processes of a step, and the step of the optimizer."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor

from compress.distributed import collectives, processes
from compress.errors import DataError
from compress.models.structure import IGNORE
from compress.surgery.quantization import prepared
from compress.training.config import TrainConfig, lr_factor
from compress.training.finite import Guard
from compress.training.forward import Batch
from compress.training.objective import Objective


class OwnResponses(Protocol):
    """In some of the steps, the student's own responses replace the targets of the data."""

    def chosen(self, step: int) -> bool:
        """Return whether step ``step`` (from 0) uses responses: the same in every process and on every call."""
        ...

    def batch(self, batch: dict[str, Tensor], step: int, part: int) -> dict[str, Tensor]:
        """Return this process's rows of part ``part`` of the step, with the student's responses."""
        ...


@dataclass(frozen=True)
class Update:
    """The mean ``loss`` and term values of an update, its learning rate, and the tokens per second that count."""

    means: Mapping[str, float]
    lr: float
    rate: float


@dataclass(eq=False)
class Updater:
    """Takes the updates of a run of ``total`` steps. ``groups`` are those of ``parameter_groups``."""

    objective: Objective
    groups: list[dict[str, Any]]
    config: TrainConfig
    accelerator: Accelerator
    device: torch.device
    guard: Guard
    total: int
    own: OwnResponses | None = None

    def __post_init__(self) -> None:
        self.parameters = [parameter for group in self.groups for parameter in group["params"]]
        self.adam = torch.optim.AdamW(self.groups, betas=self.config.betas, fused=True)
        self.model, self.optimizer = self.accelerator.prepare(self.objective, self.adam)

    def take(self, step: int, batches: Iterator[Batch]) -> Update:
        """Take step ``step`` (from 0) on the next batches."""
        factor = lr_factor(step, self.total, self.config)
        for group in self.adam.param_groups:
            group["lr"] = group["peak"] * factor
        began = time.perf_counter()
        means, tokens = self._gradients(step, batches)
        if self.config.clip is not None:
            norm = self.accelerator.clip_grad_norm_(self.parameters, self.config.clip)
            self.guard.require("gradient norm", float(norm or 0.0), step + 1)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return Update(means, self.config.lr * factor, tokens / (time.perf_counter() - began))

    def _gradients(self, step: int, batches: Iterator[Batch]) -> tuple[dict[str, float], int]:
        """Compute the gradient of one update. Return the mean ``loss`` and term values, and how many tokens count."""
        means: dict[str, float] = defaultdict(float)
        parts, scored = self._parts(step, batches)
        if not scored:
            raise DataError(f"{self.guard.name}: the batch of step {step + 1} has no token that counts in the loss")
        self.model.train()
        for part in parts:
            batch = {name: tensor.to(self.device) for name, tensor in part.items()}
            weight = _scored(part) * processes.count() / scored
            with prepared(self.objective.student, self.objective.autocast):
                total, terms = self.model(batch)
                values = _means({"loss": total, **terms}, weight)
                self._require_finite(values, step)
                self.accelerator.backward(total * weight)
            for name, value in values.items():
                means[name] += value
        return means, scored

    def _parts(self, step: int, batches: Iterator[Batch]) -> tuple[list[dict[str, Tensor]], int]:
        """Return this process's rows of each batch, and how many tokens of all processes count in the loss.

        The mean loss of a batch is weighted with the batch's share of these tokens. The sum over all batches and
        processes of an update is then the mean over its tokens, whatever the lengths of the rows.
        """
        whole = [next(batches) for _ in range(self.config.accumulate)]
        parts = [_mine(batch) for batch in whole]
        if self.own is None or not self.own.chosen(step):
            return parts, sum(map(_scored, whole))
        parts = [self.own.batch(part, step, number) for number, part in enumerate(parts)]
        return parts, round(collectives.means([sum(map(_scored, parts))])[0] * processes.count())

    def _require_finite(self, values: Mapping[str, float], step: int) -> None:
        terms = (name for name, value in values.items() if name != "loss" and not math.isfinite(value))
        self.guard.require("loss", values["loss"], step + 1, term=next(terms, "the sum"))


def _mine(batch: Batch) -> dict[str, Tensor]:
    rows = processes.share(len(batch["labels"]))
    return {name: tensor[rows] for name, tensor in batch.items()}


def _scored(batch: Batch) -> int:
    return int((batch["labels"] != IGNORE).sum())


def _means(values: Mapping[str, Tensor], weight: float) -> dict[str, float]:
    return dict(zip(values, collectives.means([value.item() * weight for value in values.values()]), strict=True))
