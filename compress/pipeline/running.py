"""Run the stages of a recipe in order. Each makes one artifact from earlier ones; finished artifacts are reused."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from rich.console import Console
from rich.markup import escape

from compress.artifact import MANIFEST, Artifact, Step, seal
from compress.distributed import collectives, processes
from compress.errors import UserError
from compress.files import write_text
from compress.pipeline.inputs import Inputs
from compress.pipeline.keys import packages
from compress.pipeline.machine import environment
from compress.pipeline.measuring import MEASUREMENTS, measure, measured_keys
from compress.pipeline.plan import make_plan, trains
from compress.pipeline.workdir import Slot, locked, read_json, shown_path, write_json
from compress.recipe import Recipe, read_recipe
from compress.recipe.document import write_document
from compress.recipe.references import GENERATED, Link
from compress.stages.stage import Context
from compress.surgery.coverage import Coverage
from compress.training.progress import duration

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class Run:
    """A finished run: its directory, its artifacts by name (models first), and one record of numbers per artifact."""

    workdir: Path
    artifacts: dict[str, Artifact] = field(repr=False)
    records: list[dict[str, Any]] = field(repr=False)


def run(
    recipe: Recipe | str | Path,
    workdir: str | Path | None = None,
    *,
    device: Device | None = None,
    console: Console | None = None,
) -> Run:
    """Run a recipe and reuse every finished result whose inputs are unchanged.

    Everything that can be checked without training is checked first. An interrupted run continues where it stopped. If
    a launcher started several processes, only the main one writes results, measures and prints. The others only take
    part in training.

    Args:
        recipe: a recipe, or the path of one.
        workdir: where results are written; by default ``runs/NAME``.
        device: ``cpu`` or ``cuda``; by default ``cuda`` if there is one.
        console: prints progress; without it nothing is printed.

    Returns:
        The artifacts by name, and one record of numbers per artifact.

    Raises:
        UserError: an argument or the recipe cannot be used.
        CompressError: a stage failed. The subclass tells how.

    Examples:
        >>> path = compress.save(model, directory / "model")
        >>> stages = "[{type: learn_masks, method: magnitude}, {type: prune, name: half, keep: 2/4}]"
        >>> text = "{version: 1, name: small, models: {base: model}, stages: " + stages + "}"
        >>> (directory / "recipe.yaml").write_text(text) > 0
        True
        >>> done = compress.run(directory / "recipe.yaml", directory / "runs")
        >>> done.artifacts["half"].config().n_embd
        16
    """
    if not isinstance(recipe, Recipe | str | os.PathLike):
        raise UserError(f"recipe: expected a recipe or the path of one, got {type(recipe).__name__}")
    if not isinstance(workdir, str | os.PathLike | None):
        raise UserError(f"workdir: expected a path such as 'runs/small', got {type(workdir).__name__}")
    if not isinstance(console, Console | None):
        raise UserError(f"console: expected a rich.console.Console or None, got {type(console).__name__}")
    chosen = choose_device(device)
    if not isinstance(recipe, Recipe):
        recipe = read_recipe(recipe)
    place = Path(workdir) if workdir is not None else default_workdir(recipe)
    collectives.join(chosen)
    inputs = Inputs(recipe, place)
    plan = make_plan(inputs)
    with locked(place):
        return _Running(inputs, plan.links, chosen, console if processes.is_main() else None).all()


def default_workdir(recipe: Recipe) -> Path:
    """Return the default work directory of a recipe."""
    return Path("runs") / recipe.name


def choose_device(device: Device | None) -> Device:
    """Return the requested device, or the best available one. Raise UserError for an unknown or missing device."""
    if device not in (None, "cpu", "cuda"):
        raise UserError(f"device: {device!r} is not known; allowed: cpu, cuda")
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise UserError("device: cuda is not possible, because torch finds no CUDA device; allowed: cpu")
    return device or ("cuda" if available and not processes.on_cpu() else "cpu")


class _Running:
    def __init__(self, inputs: Inputs, links: Sequence[Link], device: Device, console: Console | None) -> None:
        self.inputs, self.links, self.device, self.console = inputs, links, device, console
        self.recipe, self.workdir = inputs.recipe, inputs.workdir
        self.artifacts: dict[str, Artifact] = {}
        self.stages: list[dict[str, Any]] = []

    def all(self) -> Run:
        with collectives.main_first():
            self._models()
        for item in self.links:
            self._stage(item)
            self._record()
        self._record()
        with collectives.main_first():
            records = self._measured()
        return Run(self.workdir, self.artifacts, records)

    def _models(self) -> None:
        if self.console and processes.alone_by_mistake():
            self.console.print(
                "[dim]  running as one process: accelerate launch --cpu starts several only with mpirun; "
                "torchrun starts several without it[/dim]",
                highlight=False,
            )
        if processes.is_main():
            write_text(self.workdir / "recipe.yaml", write_document(self.recipe.plain(), base=self.recipe.base))
        for name in self.recipe.models:
            if self.console and self.inputs.model(name) is None:
                self.console.print(f"[dim]  {name} is built from its config[/dim]", highlight=False)
            self.artifacts[name] = self.inputs.made(name)

    def _measured(self) -> list[dict[str, Any]]:
        if processes.is_main():
            return measure(self.inputs, self.links, self._opened(), self.device, self.console)
        records: list[dict[str, Any]] = read_json(self.workdir / MEASUREMENTS)["artifacts"]
        return records

    def _opened(self) -> dict[str, Artifact]:
        """Return the artifacts that hold a model."""
        return {name: artifact for name, artifact in self.artifacts.items() if GENERATED not in artifact.traits}

    def _stage(self, item: Link) -> None:
        slot = self.inputs.stage_slot(item, self.artifacts)
        if not processes.is_main() and not slot.found and trains(item.stage):
            self._train_along(item)
        with collectives.main_first():
            found = self.inputs.finished(slot)
            artifact = found or self._made(item, slot)
        step = artifact.manifest.lineage[-1]
        self.artifacts[item.name] = artifact
        self.stages.append(
            {
                "name": item.name,
                "type": item.stage.type,
                "path": artifact.path.name,
                "seconds": step.seconds,
                "reused": bool(found),
            }
        )
        self._say(item, step, reused=bool(found))

    def _train_along(self, item: Link) -> None:
        """Take part in the training of the main process. Only the main process keeps the result."""
        with TemporaryDirectory(dir=self.workdir, prefix=".process-") as out:
            item.stage.run(self.artifacts[item.source], Path(out), self._context(item))

    def _context(self, item: Link) -> Context:
        data, seed = self.inputs.data(item.root), self.recipe.seed
        return Context(dict(self.artifacts), data, self.device, seed, bar=self.console is not None)

    def _made(self, item: Link, slot: Slot) -> Artifact:
        if not processes.is_main():
            raise UserError(
                f"--workdir {self.workdir}: does not contain the files of the main process; all processes must share it"
            )
        source, out = self.artifacts[item.source], slot.partial
        continued = out.exists()
        out.mkdir(parents=True, exist_ok=True)
        if self.console:
            if slot.unproven:
                text = f"{slot.unproven.name} has no {MANIFEST}, so it is incomplete; {item.name} runs again"
                self.console.print(f"[yellow]  {text}[/yellow]", highlight=False, soft_wrap=True)
            verb = "continues" if continued else "starts"
            self.console.print(
                f"[dim]  {item.name} ({item.stage.type}) {verb} from {item.source}[/dim]", highlight=False
            )
        context = self._context(item)
        began = time.perf_counter()
        result = item.stage.run(source, out, context)
        inputs = {role: self.artifacts[name].digest for role, name in item.inputs.items()}
        if context.data is not None:
            inputs["data"] = context.data.digest
        step = Step(
            stage=item.name,
            type=item.stage.type,
            version=item.stage.version,
            config=item.stage.model_dump(mode="json"),
            seed=context.seed,
            inputs=inputs,
            packages=packages(item.stage.gives),
            seconds=round(time.perf_counter() - began, 3),
            coverage=result.coverage.model_dump(),
            metrics=dict(result.metrics),
        )
        shutil.rmtree(out / "checkpoints", ignore_errors=True)
        return seal(
            out,
            slot.final,
            parent=source,
            traits=sorted(result.traits),
            step=step,
            kept=result.kept,
            layers=result.layers,
            quantization=result.quantization,
        )

    def _record(self) -> None:
        if not processes.is_main():
            return
        record = {
            "recipe": self.recipe.plain(),
            "seed": self.recipe.seed,
            "stages": self.stages,
            "models": {name: shown_path(artifact.path, self.workdir) for name, artifact in self._opened().items()},
            "keys": measured_keys(self.inputs, self.links, self._opened()),
            "environment": environment(self.device),
        }
        write_json(self.workdir / "run.json", record)

    def _say(self, item: Link, step: Step, *, reused: bool) -> None:
        if self.console is None:
            return
        sign = "[dim]=[/dim]" if reused else "[green]✓[/green]"
        details = [
            escape(text) for text in (_coverage(step), *(f"{name} {value:.4g}" for name, value in step.metrics.items()))
        ]
        time_text = "reused" if reused else duration(step.seconds)
        line = "  ".join(
            [f"{sign} [bold]{item.name}[/bold]", item.stage.type, *filter(None, details), f"[dim]{time_text}[/dim]"]
        )
        self.console.print(line, highlight=False)


def _coverage(step: Step) -> str:
    if step.coverage is None:
        return ""
    coverage = Coverage.model_validate(step.coverage)
    text = f"{coverage.modules_touched}/{coverage.modules_total} modules"
    if coverage.bytes_after != coverage.bytes_before:
        text += f"  {megabytes(coverage.bytes_before)} -> {megabytes(coverage.bytes_after)}"
    return f"{text}  ({coverage.note})" if coverage.note else text


def megabytes(count: int) -> str:
    """Return bytes as MB of 2^20."""
    return f"{count / 2**20:,.2f} MB"
