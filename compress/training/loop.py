"""The training loop of every stage: seeded, resumable, on Hugging Face Accelerate."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor, nn

from compress.data import Split
from compress.distributed import collectives, processes
from compress.errors import DataError, DivergedError, NothingDoneError
from compress.models.structure import IGNORE
from compress.surgery.quantization import prepared
from compress.training.checkpoint import Checkpoints, MemoryCheckpoints, Progress
from compress.training.config import Group, TrainConfig, lr_factor, parameter_groups
from compress.training.forward import Batch, nll
from compress.training.history import History
from compress.training.interrupt import Interrupt
from compress.training.objective import Objective
from compress.training.progress import Meter


@dataclass(frozen=True)
class Place:
    """Directory, device and seed of a training stage, and whether to draw a progress bar.

    Without a directory nothing is written. The best weights then stay in memory, and the run cannot be resumed.
    """

    out: Path | None
    device: str = "cpu"
    seed: int = 0
    bar: bool = True
    name: str = "train"


class OwnResponses(Protocol):
    """In some of the steps, the student's own responses replace the targets of the data."""

    def chosen(self, step: int) -> bool:
        """Whether step ``step`` (from 0) uses responses. The result is the same in every process and on every call."""
        ...

    def batch(self, batch: dict[str, Tensor], step: int, part: int) -> dict[str, Tensor]:
        """This process's rows of part ``part`` of the step, with the student's responses."""
        ...


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
        built = parameter_groups({**self.groups, "projections": list(self.objective.parts.parameters())}, config)
        if not built:
            raise NothingDoneError(f"{place.name}: nothing to train; every parameter is frozen")
        self.parameters = [p for group in built for p in group["params"]]
        self.total = config.total(len(self.data))
        self.eval_every = config.eval_every or max(1, self.total // 10)
        self.save_every = config.checkpoint_every or self.eval_every
        if self.own is not None and not self._own_steps():
            raise NothingDoneError(f"{place.name}: on_policy chose none of {self.total} steps; raise its fraction")
        collectives.join(place.device)
        self.checkpoints: Checkpoints | MemoryCheckpoints = MemoryCheckpoints()
        if place.out is not None:
            self.checkpoints = Checkpoints(Path(collectives.from_main(str(place.out))) / "checkpoints")
        self.accelerator = Accelerator(
            cpu=place.device == "cpu",
            mixed_precision="no",  # the recipe sets the precision, not the launcher
            log_with=list(config.trackers) or None,
            project_dir=_tracker_directory(place) if config.trackers else None,
            # every update runs the same graph, but a term may leave some parameters unused
            kwargs_handlers=[DistributedDataParallelKwargs(static_graph=True)],
        )
        self.adam = torch.optim.AdamW(built, betas=config.betas, fused=True)
        self.model, self.optimizer = self.accelerator.prepare(self.objective, self.adam)

    def run(self) -> Trained:
        torch.manual_seed(self.place.seed + processes.rank())
        if self.config.trackers:
            self.accelerator.init_trackers(self.place.name)
        torn: list[str] = []
        best = self.config.keep == "best"
        found = self.checkpoints.restore(self.objective, self.adam, best=best, report=torn.append)
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
                self._step(batches)
                self._milestones()
                if _anywhere(interrupt.asked):
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

    def _step(self, batches: Iterator[Batch]) -> None:
        factor = lr_factor(self.progress.step, self.total, self.config)
        for group in self.adam.param_groups:
            group["lr"] = group["peak"] * factor
        began = time.perf_counter()
        means, tokens = self._gradients(batches)
        if self.config.clip is not None:
            norm = self.accelerator.clip_grad_norm_(self.parameters, self.config.clip)
            self._require_finite("gradient norm", float(norm or 0.0))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.step += 1
        self._report(means, self.config.lr * factor, tokens / (time.perf_counter() - began))

    def _gradients(self, batches: Iterator[Batch]) -> tuple[dict[str, float], int]:
        """Compute the gradient of one update. Return the mean ``loss`` and term values, and the scored tokens."""
        means: dict[str, float] = defaultdict(float)
        parts, scored = self._parts(batches)
        if not scored:
            raise DataError(f"{self.place.name}: the batch of step {self.progress.step + 1} has no token to score")
        self.model.train()
        for part in parts:
            batch = {name: tensor.to(self.accelerator.device) for name, tensor in part.items()}
            weight = _scored(part) * processes.count() / scored
            with prepared(self.objective.student, self.objective.autocast):
                total, terms = self.model(batch)
                values = _means({"loss": total, **terms}, weight)
                self._finite(values)
                self.accelerator.backward(total * weight)
            for name, value in values.items():
                means[name] += value
        return means, scored

    def _parts(self, batches: Iterator[Batch]) -> tuple[list[dict[str, Tensor]], int]:
        """This process's rows of each batch of an update, and the number of tokens that all processes score in it.

        The mean loss of a batch is weighted with the batch's share of the scored tokens. The sum over all batches and
        processes of an update is then the mean over its tokens, whatever the lengths of the rows.
        """
        whole = [next(batches) for _ in range(self.config.accumulate)]
        parts = [_mine(batch) for batch in whole]
        step = self.progress.step
        if self.own is None or not self.own.chosen(step):
            return parts, sum(map(_scored, whole))
        parts = [self.own.batch(part, step, number) for number, part in enumerate(parts)]
        return parts, round(_mean([sum(map(_scored, parts))])[0] * processes.count())

    def _report(self, means: Mapping[str, float], lr: float, rate: float) -> None:
        step, loss = self.progress.step, means["loss"]
        terms = {name: value for name, value in means.items() if name != "loss"}
        kind = {} if self.own is None else {"on_policy": self.own.chosen(step - 1)}
        self.history.write(step=step, loss=loss, terms=terms, lr=lr, tokens_per_s=round(rate), **kind)
        self.meter.update(loss, terms, rate)
        if self.config.trackers:
            self.accelerator.log(dict(means), step=step)

    def _milestones(self) -> None:
        step, last = self.progress.step, self.progress.step == self.total
        if self.evaluate is not None and (step % self.eval_every == 0 or last):
            value = self._evaluated()
            self._require_finite("loss on data.eval", value, self.progress.step)
            self.progress.last_nll = value
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
        totals = [0.0, 0.0]
        dtype = self.objective.autocast
        with (
            torch.no_grad(),
            prepared(side.model, dtype),
            torch.autocast(side.device.type, dtype, enabled=dtype is not None),
        ):
            for batch in islice(self.evaluate.loader(self.config.batch), processes.rank(), None, processes.count()):
                value, count = nll(side, {name: tensor.to(side.device) for name, tensor in batch.items()})
                totals[0] += value
                totals[1] += count
        total, tokens = _mean(totals)
        if not tokens:
            raise DataError("data.eval has no scored tokens")
        return total / tokens

    def _finite(self, values: Mapping[str, float]) -> None:
        terms = (name for name, value in values.items() if name != "loss" and not math.isfinite(value))
        self._require_finite("loss", values["loss"], term=next(terms, "the sum"))

    def _require_finite(self, what: str, value: float, step: int | None = None, *, term: str = "") -> None:
        """Raise before a step with a NaN or infinite value is kept. ``step`` is by default the current one."""
        if math.isfinite(value):
            return
        last = self.checkpoints.latest()
        where = f"the last good checkpoint is {last}" if last else "no checkpoint was written before"
        raise DivergedError(
            f"{self.place.name}: {what} is {value} at step {step or self.progress.step + 1}"
            f"{f' (term {term})' if term else ''}; {where}; try a lower lr than {self.config.lr:g}"
        )

    def _save(self) -> None:
        if not all(bool(torch.isfinite(parameter).all()) for parameter in self.parameters):
            self._require_finite("a parameter", math.nan, self.progress.step)
        self.checkpoints.save(self.objective, self.adam, self.progress)

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


def _mine(batch: Batch) -> dict[str, Tensor]:
    rows = processes.share(len(batch["labels"]))
    return {name: tensor[rows] for name, tensor in batch.items()}


def _scored(batch: Batch) -> int:
    return int((batch["labels"] != IGNORE).sum())


def _mean(values: Sequence[float]) -> list[float]:
    """Each value's mean over the processes."""
    means: list[float] = collectives.mean(torch.tensor(values, dtype=torch.float64)).tolist()
    return means


def _means(values: Mapping[str, Tensor], weight: float) -> dict[str, float]:
    return dict(zip(values, _mean([value.item() * weight for value in values.values()]), strict=True))


def _anywhere(flag: bool) -> bool:
    return _mean([float(flag)])[0] > 0
