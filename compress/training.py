"""The only training loop: seeded, resumable, on Hugging Face Accelerate."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from compress.checkpoint import Checkpoints, Progress
from compress.data import Split
from compress.errors import DataError, DivergedError, NothingDoneError
from compress.history import History
from compress.interrupt import Interrupt
from compress.models.structure import IGNORE
from compress.objective import Objective, nll
from compress.progress import Meter
from compress.registry import suggest
from compress.schema import Strict
from compress.surgery.quantize import prepared

Group = Literal["weights", "masks", "scales", "projections"]
Decay = Annotated[float, Field(ge=0, lt=1)]


class TrainConfig(Strict):
    """How a stage trains. Give ``steps`` or ``epochs``; a step updates on ``batch`` x ``accumulate`` sequences."""

    steps: int | None = Field(None, ge=0)
    epochs: float | None = Field(None, gt=0)
    batch: int = Field(16, ge=1)
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
    """Of matrix products under autocast; parameters, losses and evaluation stay float32."""
    dropout: float | None = Field(None, ge=0, lt=1)
    """Of the student while it trains; without it, what its config says."""
    eval_every: int | None = Field(None, ge=1)
    """Steps between evaluations; without it, ten times in a stage."""
    keep: Literal["best", "last"] = "best"
    """Which weights the stage hands on: the best on ``data.eval`` (the last where there is none), or the last."""
    checkpoint_every: int | None = Field(None, ge=1)
    """Steps between checkpoints; without it, with each evaluation."""
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
        """Updates in all for a split of ``rows`` sequences."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return max(1, round(self.epochs * rows / (self.batch * self.accumulate)))


@dataclass(frozen=True)
class Place:
    """Where and with what a stage trains: directory, device, seed, and whether to draw a progress bar."""

    out: Path
    device: str = "cpu"
    seed: int = 0
    bar: bool = True
    name: str = "train"


@dataclass
class Trained:
    """What a finished training run tells: steps, the best evaluation, and how it moved."""

    steps: int
    best_step: int | None = None
    best_nll: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)


def lr_factor(step: int, total: int, config: TrainConfig) -> float:
    """Share of the peak learning rate at update ``step`` (from 0): linear warm-up, then the schedule down to 0."""
    warmup = round(config.warmup * total)
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(total - warmup, 1)
    return {"linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done)), "constant": 1.0}[config.schedule]


def parameter_groups(groups: Mapping[Group, Sequence[nn.Parameter]], config: TrainConfig) -> list[dict[str, Any]]:
    """AdamW groups: own learning rates; decay on weight matrices alone (never on masks, scales, biases or norms)."""
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


def train(
    objective: Objective,
    groups: Mapping[Group, Sequence[nn.Parameter]],
    data: Split,
    evaluate: Split | None,
    config: TrainConfig,
    place: Place,
) -> Trained:
    """Train ``objective`` in place and leave the chosen weights in it.

    Writes ``history.jsonl`` into ``place.out`` and checkpoints beside it; a run that was interrupted continues from the
    last checkpoint and ends bit for bit where a straight run ends (same machine, same number of threads).
    """
    if not len(data):
        raise DataError("data.train has no rows to train on")
    if config.total(len(data)) == 0:
        return Trained(steps=0)
    return _Loop(objective, groups, data, evaluate, config, place).run()


@dataclass(eq=False)
class _Loop:
    """One run: what it works on, how far it is, and where it writes."""

    objective: Objective
    groups: Mapping[Group, Sequence[nn.Parameter]]
    data: Split
    evaluate: Split | None
    config: TrainConfig
    place: Place

    def __post_init__(self) -> None:
        config, place = self.config, self.place
        built = parameter_groups({**self.groups, "projections": list(self.objective.parts.parameters())}, config)
        if not built:
            raise NothingDoneError(f"{place.name}: nothing to train; every parameter is frozen")
        self.parameters = [p for group in built for p in group["params"]]
        self.total = config.total(len(self.data))
        self.eval_every = config.eval_every or max(1, self.total // 10)
        self.save_every = config.checkpoint_every or self.eval_every
        self.checkpoints = Checkpoints(place.out / "checkpoints")
        self.accelerator = Accelerator(
            cpu=place.device == "cpu",
            log_with=list(config.trackers) or None,
            project_dir=place.out.parent / "trackers" if config.trackers else None,
        )
        self.adam = torch.optim.AdamW(built, betas=config.betas, fused=True)
        self.model, self.optimizer = self.accelerator.prepare(self.objective, self.adam)

    def run(self) -> Trained:
        torch.manual_seed(self.place.seed)
        if self.config.trackers:
            self.accelerator.init_trackers(self.place.name)
        torn: list[str] = []
        best = self.config.keep == "best"
        found = self.checkpoints.restore(self.objective, self.adam, best=best, tell=torn.append)
        self.progress = found or Progress()
        self.history = History(self.place.out / "history.jsonl", keep_until=self.progress.step)
        self.meter = Meter(
            self.place.name,
            self.total,
            self.progress.step,
            shown=self.place.bar and self.accelerator.is_main_process,
        )
        for text in torn:
            self.meter.warn(f"{text}; training goes on from step {self.progress.step}")
        batches = self._batches()
        with Interrupt() as interrupt, self.meter:
            while self.progress.step < self.total:
                self._step(batches)
                if self.accelerator.is_main_process:
                    self._milestones()
                if interrupt.asked:
                    self._save()
                    raise KeyboardInterrupt
        return self._finish()

    def _batches(self) -> Iterator[Any]:
        loader = self.data.loader(
            self.config.batch,
            seed=self.place.seed,
            shuffle=True,
            start=self.progress.step * self.config.accumulate,
            steps=self.total * self.config.accumulate,
        )
        return iter(self.accelerator.prepare(loader))

    def _step(self, batches: Iterator[Any]) -> None:
        factor = lr_factor(self.progress.step, self.total, self.config)
        for group in self.adam.param_groups:
            group["lr"] = group["peak"] * factor
        began = time.perf_counter()
        means, tokens = self._gradients(batches)
        if self.config.clip is not None:
            self.accelerator.clip_grad_norm_(self.parameters, self.config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.step += 1
        rate = tokens * self.accelerator.num_processes / (time.perf_counter() - began)
        self._tell(means, self.config.lr * factor, rate)

    def _gradients(self, batches: Iterator[Any]) -> tuple[dict[str, float], int]:
        """Form the gradient of one update; return the means of ``loss`` and of each term, and the tokens scored."""
        parts = self.config.accumulate
        means: dict[str, float] = defaultdict(float)
        tokens = 0
        self.model.train()
        for _ in range(parts):
            batch = next(batches)
            with prepared(self.objective.student, self.objective.autocast):
                total, terms = self.model(batch)
                self._finite(total, terms)
                self.accelerator.backward(total / parts)
            tokens += int((batch["labels"] != IGNORE).sum())
            for name, value in {"loss": total, **terms}.items():
                means[name] += value.item() / parts
        return means, tokens

    def _tell(self, means: Mapping[str, float], lr: float, rate: float) -> None:
        step, loss = self.progress.step, means["loss"]
        terms = {name: value for name, value in means.items() if name != "loss"}
        self.history.write(step=step, loss=loss, terms=terms, lr=lr, tokens_per_s=round(rate))
        self.meter.update(loss, terms, rate)
        if self.config.trackers:
            self.accelerator.log(dict(means), step=step)

    def _milestones(self) -> None:
        step, last = self.progress.step, self.progress.step == self.total
        if self.evaluate is not None and (step % self.eval_every == 0 or last):
            value = self._evaluated()
            self.history.write(step=step, eval_nll=value)
            self.meter.evaluated(value)
            if self.progress.best_nll is None or value < self.progress.best_nll:
                self.progress.best_nll, self.progress.best_step = value, step
                if self.config.keep == "best":
                    self.checkpoints.keep_best(self.objective)
        if step % self.save_every == 0 and not last:
            self._save()

    def _evaluated(self) -> float:
        assert self.evaluate is not None
        self.objective.eval()
        side = self.objective.sides[0]
        totals = [0.0, 0]
        dtype = self.objective.autocast
        with (
            torch.no_grad(),
            prepared(side.model, dtype),
            torch.autocast(side.device.type, dtype, enabled=dtype is not None),
        ):
            for batch in self.evaluate.loader(self.config.batch):
                value, count = nll(side, {name: tensor.to(side.device) for name, tensor in batch.items()})
                totals[0] += value
                totals[1] += count
        if not totals[1]:
            raise DataError("data.eval has no scored tokens")
        return totals[0] / totals[1]

    def _finite(self, total: Tensor, terms: Mapping[str, Tensor]) -> None:
        if math.isfinite(total.item()):
            return
        broken = next((name for name, value in terms.items() if not math.isfinite(value.item())), "the sum")
        last = self.checkpoints.latest()
        where = f"the last good checkpoint is {last}" if last else "no checkpoint was written before"
        raise DivergedError(
            f"{self.place.name}: loss is {total.item()} at step {self.progress.step + 1} (term {broken}); {where}; "
            f"try a lower lr than {self.config.lr:g}"
        )

    def _save(self) -> None:
        self.checkpoints.save(self.objective, self.adam, self.progress)

    def _finish(self) -> Trained:
        self.accelerator.wait_for_everyone()
        if self.config.trackers:
            self.accelerator.end_training()
        if self.config.keep == "best" and self.progress.best_step is not None:
            self.checkpoints.restore_best(self.objective)
        self.objective.eval()
        metrics = {} if self.progress.best_nll is None else {"eval_nll": self.progress.best_nll}
        return Trained(self.total, self.progress.best_step, self.progress.best_nll, metrics)
