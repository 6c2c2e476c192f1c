"""The only training loop: seeded, resumable, on Hugging Face Accelerate."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from pydantic import Field, model_validator
from torch import Tensor, nn

from compress.checkpoint import Checkpoints, Progress
from compress.data import Split
from compress.errors import DataError, DivergedError, NothingDoneError
from compress.interrupt import Interrupt
from compress.objective import Objective, nll
from compress.progress import Meter
from compress.schema import Strict
from compress.surgery.quantize import prepared

Group = Literal["weights", "masks", "scales", "projections"]


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
    betas: tuple[float, float] = (0.9, 0.999)
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
    """Which weights the stage hands on: the best on ``data.eval``, or the last."""
    checkpoint_every: int | None = Field(None, ge=1)
    """Steps between checkpoints; without it, with each evaluation."""
    trackers: tuple[str, ...] = ()
    """Names that Accelerate knows, such as ``tensorboard`` or ``wandb``."""

    @model_validator(mode="after")
    def _one_length(self) -> TrainConfig:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either steps or epochs")
        return self

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


class _Loop:
    def __init__(
        self,
        objective: Objective,
        groups: Mapping[Group, Sequence[nn.Parameter]],
        data: Split,
        evaluate: Split | None,
        config: TrainConfig,
        place: Place,
    ) -> None:
        self.objective, self.data, self.evaluate = objective, data, evaluate
        self.config, self.place, self.total = config, place, config.total(len(data))
        built = parameter_groups({**groups, "projections": list(objective.parts.parameters())}, config)
        if not built:
            raise NothingDoneError(f"{place.name}: nothing to train; every parameter is frozen")
        self.parameters = [p for group in built for p in group["params"]]
        self.optimizer = torch.optim.AdamW(built, betas=config.betas, fused=True)
        self.eval_every = config.eval_every or max(1, self.total // 10)
        self.save_every = config.checkpoint_every or self.eval_every
        self.checkpoints = Checkpoints(place.out / "checkpoints")
        self.progress = Progress()

    def run(self) -> Trained:
        torch.manual_seed(self.place.seed)
        accelerator = Accelerator(
            cpu=self.place.device == "cpu",
            log_with=list(self.config.trackers) or None,
            project_dir=self.place.out.parent / "trackers" if self.config.trackers else None,
        )
        if self.config.trackers:
            accelerator.init_trackers(self.place.name)
        model, optimizer = accelerator.prepare(self.objective, self.optimizer)
        self.progress = self.checkpoints.restore(self.objective, self.optimizer) or Progress()
        loader = self.data.loader(
            self.config.batch,
            seed=self.place.seed,
            shuffle=True,
            start=self.progress.step * self.config.accumulate,
            steps=self.total * self.config.accumulate,
        )
        batches = iter(accelerator.prepare(loader))
        history = History(self.place.out / "history.jsonl", keep_until=self.progress.step)
        shown = self.place.bar and accelerator.is_main_process
        with Interrupt() as interrupt, Meter(self.place.name, self.total, self.progress.step, shown=shown) as meter:
            while self.progress.step < self.total:
                self._step(accelerator, model, optimizer, batches, history, meter)
                if interrupt.asked:
                    self._save()
                    raise KeyboardInterrupt
        return self._finish(accelerator)

    def _step(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: Any,
        batches: Iterator[Any],
        history: History,
        meter: Meter,
    ) -> None:
        config, step = self.config, self.progress.step
        model.train()
        factor = lr_factor(step, self.total, config)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        began, tokens = time.perf_counter(), 0
        sums: dict[str, float] = {}
        for _ in range(config.accumulate):
            batch = next(batches)
            with prepared(self.objective.student, self.objective.autocast):
                total, terms = model(batch)
                self._finite(total, terms)
                accelerator.backward(total / config.accumulate)
            tokens += int((batch["labels"] != -100).sum())
            for name, value in {"loss": total, **terms}.items():
                sums[name] = sums.get(name, 0.0) + value.item() / config.accumulate
        if config.clip is not None:
            accelerator.clip_grad_norm_(self.parameters, config.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.progress.step += 1
        loss = sums.pop("loss")
        rate = tokens * accelerator.num_processes / (time.perf_counter() - began)
        history.write(step=self.progress.step, loss=loss, terms=sums, lr=config.lr * factor, tokens_per_s=round(rate))
        meter.update(loss, sums, rate)
        if self.config.trackers:
            accelerator.log({"loss": loss, **sums}, step=self.progress.step)
        if accelerator.is_main_process:
            self._milestones(history, meter)

    def _milestones(self, history: History, meter: Meter) -> None:
        step, last = self.progress.step, self.progress.step == self.total
        if self.evaluate is not None and (step % self.eval_every == 0 or last):
            value = self._evaluated()
            history.write(step=step, eval_nll=value)
            meter.evaluated(value)
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
        self.checkpoints.save(self.objective, self.optimizer, self.progress)

    def _finish(self, accelerator: Accelerator) -> Trained:
        accelerator.wait_for_everyone()
        if self.config.trackers:
            accelerator.end_training()
        if self.config.keep == "best" and self.progress.best_step is not None:
            self.checkpoints.restore_best(self.objective)
        self.objective.eval()
        metrics = {} if self.progress.best_nll is None else {"eval_nll": self.progress.best_nll}
        return Trained(self.total, self.progress.best_step, self.progress.best_nll, metrics)


class History:
    """Training curves as JSON lines; those past ``keep_until``, the checkpoint resumed from, are dropped."""

    def __init__(self, path: Path, keep_until: int) -> None:
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in lines if json.loads(line)["step"] <= keep_until]
        path.write_text("".join(line + "\n" for line in kept))
        self.path = path

    def write(self, **values: Any) -> None:
        """Append one line."""
        with self.path.open("a") as file:
            file.write(json.dumps(values) + "\n")
