"""The training loop of every stage: seeded, resumable, on Hugging Face Accelerate."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import nn

from compress.data import Split
from compress.distributed import collectives, processes
from compress.errors import DataError, NothingDoneError
from compress.training.checkpoint import Checkpoints, MemoryCheckpoints, Progress
from compress.training.config import Group, TrainConfig, parameter_groups
from compress.training.finite import Guard
from compress.training.forward import Batch, mean_nll
from compress.training.history import History
from compress.training.interrupt import Interrupt
from compress.training.objective import Objective
from compress.training.progress import Meter
from compress.training.update import OwnResponses, Update, Updater


@dataclass(frozen=True)
class Place:
    """Directory, device and seed of a training stage, and whether to draw a progress bar.

    Without a directory nothing is written. The best weights then stay in memory, and the run cannot be resumed. If
    several processes train, each has the device that the launcher gave it, and ``device`` says only of what type.
    """

    out: Path | None
    device: str | torch.device = "cpu"
    seed: int = 0
    bar: bool = True
    name: str = "train"


@dataclass
class Trained:
    """The result of a finished training run: steps, the best evaluation, metrics, and the training curve."""

    steps: int
    best_step: int | None = None
    best_nll: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list, compare=False)
    """One entry per step (``loss``, ``terms``, ``lr``, ``tokens_per_s``) and one per evaluation (``eval_nll``)."""


def train(
    objective: Objective,
    groups: Mapping[Group, Sequence[nn.Parameter]],
    data: Split,
    evaluate: Split | None,
    config: TrainConfig,
    place: Place,
    *,
    own: OwnResponses | None = None,
) -> Trained:
    """Train ``objective`` in place and leave the chosen weights in it. ``own`` replaces the rows of some steps.

    Writes ``history.jsonl`` into ``place.out`` and checkpoints beside it. An interrupted run continues from the last
    checkpoint. It ends with the same bits as an uninterrupted run on the same machine with as many threads.

    The processes of a run share each batch. Together they take the step that one process would take on the whole batch.
    The main process writes the checkpoints, and the numbers in every ``history.jsonl`` are those of the main process.
    """
    if not len(data):
        raise DataError("data.train has no rows to train on")
    if config.total(len(data)) == 0:
        return Trained(steps=0)
    return _Loop(objective, groups, data, evaluate, config, place, own).run()


@dataclass(eq=False)
class _Loop:
    """The state of one run: its inputs, its progress and its output."""

    objective: Objective
    groups: Mapping[Group, Sequence[nn.Parameter]]
    data: Split
    evaluate: Split | None
    config: TrainConfig
    place: Place
    own: OwnResponses | None = None

    def __post_init__(self) -> None:
        config, place = self.config, self.place
        if self.objective.numbered:
            self.objective.make_room(len(self.data), self.data.longest_target)
        groups = parameter_groups({**self.groups, "projections": list(self.objective.parts.parameters())}, config)
        if not groups:
            raise NothingDoneError(f"{place.name}: nothing to train; every parameter is frozen")
        self.total = config.total(len(self.data))
        self.eval_every = config.eval_every or max(1, self.total // 10)
        self.save_every = config.checkpoint_every or self.eval_every
        if self.own is not None and not self._own_steps():
            raise NothingDoneError(f"{place.name}: on_policy chose none of {self.total} steps; raise its fraction")
        kind = torch.device(place.device).type
        collectives.join(kind)
        self.checkpoints: Checkpoints | MemoryCheckpoints = MemoryCheckpoints()
        if place.out is not None:
            self.checkpoints = Checkpoints(Path(collectives.from_main(str(place.out))) / "checkpoints")
        alone = processes.count() == 1
        self.accelerator = Accelerator(
            # Accelerate knows one device per process, for good; a process that is alone may train on several in turn
            device_placement=not alone,
            cpu=kind == "cpu" and (not alone or "LOCAL_RANK" in os.environ),
            mixed_precision="no",  # the recipe sets the precision, not the launcher
            log_with=list(config.trackers) or None,
            project_dir=_tracker_directory(place) if config.trackers else None,
            # every update runs the same graph, but a term may leave some parameters unused
            kwargs_handlers=[DistributedDataParallelKwargs(static_graph=True)],
        )
        self.guard = Guard(place.name, config.lr, self.checkpoints.latest)
        device = torch.device(place.device) if alone else self.accelerator.device
        self.updater = Updater(
            objective=self.objective,
            groups=groups,
            config=config,
            accelerator=self.accelerator,
            device=device,
            guard=self.guard,
            total=self.total,
            own=self.own,
        )

    def run(self) -> Trained:
        torch.manual_seed(self.place.seed + processes.rank())
        if self.config.trackers:
            self.accelerator.init_trackers(self.place.name)
        torn: list[str] = []
        best = self.config.keep == "best"
        found = self.checkpoints.restore(self.objective, self.updater.adam, best=best, report=torn.append)
        self.progress = found or Progress()
        curve = None if self.place.out is None else self.place.out / "history.jsonl"
        self.history = History(curve, keep_until=self.progress.step)
        self.meter = Meter(
            self.place.name,
            self.total,
            self.progress.step,
            shown=self.place.bar and processes.is_main(),
        )
        for text in torn:
            self.meter.warn(f"{text}; training continues from step {self.progress.step}")
        batches = self._batches()
        with Interrupt() as interrupt, self.meter:
            while self.progress.step < self.total:
                update = self.updater.take(self.progress.step, batches)
                self.progress.step += 1
                self._report(update)
                self._milestones()
                if collectives.anywhere(interrupt.asked):
                    self._save()
                    raise KeyboardInterrupt
        return self._finish()

    def _batches(self) -> Iterator[Batch]:
        loader = self.data.loader(
            self.config.batch,
            seed=self.place.seed,
            shuffle=True,
            start=self.progress.step * self.config.accumulate,
            steps=self.total * self.config.accumulate,
            numbered=self.objective.numbered,
        )
        return iter(loader)

    def _report(self, update: Update) -> None:
        step, loss = self.progress.step, update.means["loss"]
        terms = {name: value for name, value in update.means.items() if name != "loss"}
        kind = {} if self.own is None else {"on_policy": self.own.chosen(step - 1)}
        self.history.write(step=step, loss=loss, terms=terms, lr=update.lr, tokens_per_s=round(update.rate), **kind)
        self.meter.update(loss, terms, update.rate)
        if self.config.trackers:
            self.accelerator.log(dict(update.means), step=step)

    def _milestones(self) -> None:
        step, last = self.progress.step, self.progress.step == self.total
        if self.evaluate is not None and (step % self.eval_every == 0 or last):
            self.objective.eval()
            value = mean_nll(self.objective.sides[0], self.evaluate, self.config.batch, self.objective.autocast)
            self.guard.require("loss on data.eval", value, step)
            self.progress.last_nll = value
            self.history.write(step=step, eval_nll=value)
            self.meter.evaluated(value)
            if self.progress.best_nll is None or value < self.progress.best_nll:
                self.progress.best_nll, self.progress.best_step = value, step
                if self.config.keep == "best":
                    self.checkpoints.keep_best(self.objective)
        if step % self.save_every == 0 and not last:
            self._save()

    def _save(self) -> None:
        if not all(bool(torch.isfinite(parameter).all()) for parameter in self.updater.parameters):
            self.guard.require("a parameter", math.nan, self.progress.step)
        self.checkpoints.save(self.objective, self.updater.adam, self.progress)

    def _own_steps(self) -> int:
        return sum(self.own.chosen(step) for step in range(self.total)) if self.own else 0

    def _finish(self) -> Trained:
        for tracker in self.accelerator.trackers:  # end_training would disconnect the processes as well
            tracker.finish()
        if self.config.keep == "best" and self.progress.best_step is not None:
            self.checkpoints.restore_best(self.objective)
        self.objective.eval()
        progress = self.progress
        handed_on = progress.best_nll if self.config.keep == "best" else progress.last_nll
        metrics = {} if handed_on is None else {"eval_nll": handed_on}
        if self.own is not None:
            metrics["on_policy_steps"] = float(self._own_steps())
        return Trained(self.total, progress.best_step, progress.best_nll, metrics, self.history.rows)


def _tracker_directory(place: Place) -> Path:
    return Path("trackers") if place.out is None else place.out.parent / "trackers"
