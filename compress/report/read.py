"""Read the records of a work directory.

Only JSON is read. Only the fields that a report uses are named here; all others are kept and passed through.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field, ValidationError

from compress.errors import UserError
from compress.measure.record import Record, View
from compress.problem import Problem
from compress.schema import fault


class Touched(View):
    """The coverage of a stage: the counts of what it changed, and the totals."""

    modules_touched: int
    modules_total: int
    parameters_touched: int
    parameters_total: int
    bytes_before: int | None = None
    bytes_after: int | None = None
    note: str = ""


class Step(View):
    """One stage in the lineage of an artifact."""

    stage: str
    type: str
    config: dict[str, Any] = Field(default_factory=dict)
    seed: int | None = None
    inputs: dict[str, str] = Field(default_factory=dict)
    seconds: float | None = None
    coverage: Touched | None = None
    metrics: dict[str, float] = Field(default_factory=dict)


class Manifest(View):
    """The part of ``artifact.json`` that a report shows."""

    family: str = ""
    traits: tuple[str, ...] = ()
    sizes: dict[str, int] = Field(default_factory=dict)
    kept: dict[str, list[int]] = Field(default_factory=dict)
    quantization: dict[str, Any] | None = None
    lineage: tuple[Step, ...] = ()
    digest: str = ""


class StageRun(View):
    """One stage as ``run.json`` lists it."""

    name: str
    type: str
    path: str
    seconds: float | None = None
    reused: bool = False


class RunFile(View):
    """``run.json``."""

    recipe: Any = None
    seed: int | None = None
    stages: tuple[StageRun, ...] = ()
    models: dict[str, str] = Field(default_factory=dict)
    """The path of every artifact, by name."""
    keys: dict[str, str] = Field(default_factory=dict)
    """The key that numbers of each artifact must have. Empty in runs of older versions."""
    environment: dict[str, Any] = Field(default_factory=dict)


class Measurements(View):
    """``measurements.json``."""

    artifacts: tuple[Record, ...] = ()
    environment: dict[str, Any] = Field(default_factory=dict)
    conditions: Any = None


@dataclass(frozen=True)
class Stage:
    """A finished stage: its entry in ``run.json``, its manifest, its training curve and its details."""

    entry: StageRun
    manifest: Manifest
    history: tuple[dict[str, Any], ...]
    details: dict[str, Any]

    @property
    def step(self) -> Step | None:
        """This stage in the lineage of its own artifact."""
        return self.manifest.lineage[-1] if self.manifest.lineage else None


@dataclass(frozen=True)
class Run:
    """One work directory."""

    name: str
    file: RunFile
    measured: Measurements
    stages: tuple[Stage, ...]

    @property
    def title(self) -> str:
        """The name in the recipe, or otherwise the name of the directory."""
        recipe = self.file.recipe
        name = recipe.get("name") if isinstance(recipe, dict) else recipe
        return str(name or self.name)

    @property
    def environment(self) -> dict[str, Any]:
        """The machine and the package versions, as the run and its measurements recorded them."""
        return {**self.file.environment, **self.measured.environment}

    @property
    def records(self) -> tuple[Record, ...]:
        """One record per artifact. It is empty if its numbers belong to another version of the artifact."""
        taken = {record.name: record for record in self.measured.artifacts if self._belongs(record)}
        return tuple(taken.get(name) or Record(name=name, path=path) for name, path in self.file.models.items())

    def late(self, record: Record) -> bool:
        """Return whether the run has not yet measured the current version of this artifact."""
        return not any(other.name == record.name and self._belongs(other) for other in self.measured.artifacts)

    def _belongs(self, record: Record) -> bool:
        if record.key and self.file.keys:
            return self.file.keys.get(record.name) == record.key
        return self.file.models.get(record.name) == record.path

    def sources(self, stage: Stage) -> str:
        """Return the source of ``stage``, its teacher, and its targets."""
        if stage.step is None:
            return ""
        digest, config = stage.step.inputs.get("source"), stage.step.config
        made = (other.entry.name for other in self.stages if other.manifest.digest == digest)
        source = next(made, None) or config.get("source") or next(iter(self.file.models), "")
        others = (f"{role} {config[role]}" for role in ("teacher", "targets") if config.get(role))
        return ", ".join([source, *others])

    def manifest(self, name: str) -> Manifest:
        """Return the manifest of the artifact called ``name``. It is empty for a model that no stage has changed."""
        return next((stage.manifest for stage in self.stages if stage.entry.name == name), Manifest())

    def details(self, name: str) -> dict[str, Any]:
        """Return the details that a stage wrote about the artifact ``name``. Empty for a model that no stage made."""
        return next((stage.details for stage in self.stages if stage.entry.name == name), {})


Known = TypeVar("Known", bound=View)


def read(workdir: Path) -> Run:
    """Read a work directory.

    Raises:
        UserError: the directory holds no ``run.json``, or one of its files has the wrong form.
    """
    if not (workdir / "run.json").is_file():
        raise UserError(f"{workdir}: no run.json here; give a directory that `compress-lm run` wrote")
    file = _view(RunFile, workdir / "run.json")
    return Run(
        name=workdir.resolve().name,
        file=file,
        measured=_view(Measurements, workdir / "measurements.json"),
        stages=tuple(_stage(entry, workdir) for entry in file.stages),
    )


def _stage(entry: StageRun, workdir: Path) -> Stage:
    directory = workdir / entry.path
    manifest = directory / "artifact.json"
    if not manifest.is_file():
        raise UserError(f"{manifest}: does not exist, so {entry.name} cannot be reported; run the recipe again")
    return Stage(
        entry=entry,
        manifest=_view(Manifest, manifest),
        history=_lines(directory / "history.jsonl"),
        details=_json(directory / "details.json"),
    )


def _view(kind: type[Known], path: Path) -> Known:
    try:
        return kind.model_validate(_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        text = f"{fault(first)}, got {first['input']!r}"
        raise UserError(f"{path}: {Problem(first['loc'], text)}") from error


def _json(path: Path) -> dict[str, Any]:
    """Return the object in ``path``. It is empty if the file does not exist."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _lines(path: Path) -> tuple[dict[str, Any], ...]:
    if not path.is_file():
        return ()
    try:
        return tuple(json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except ValueError as error:
        raise UserError(f"{path}: not JSON lines: {error}") from error
