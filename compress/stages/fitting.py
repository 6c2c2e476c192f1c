"""Shared parts of all training stages: their fields, and the call of the training loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import AfterValidator, BeforeValidator, SerializeAsAny
from torch import nn

from compress.artifact import Artifact, save_model
from compress.engine import fitting as engine
from compress.errors import ModelError
from compress.registry import TERMS
from compress.schema import added
from compress.stages.stage import Context, Result, Stage
from compress.surgery.coverage import Coverage
from compress.training.config import Group, TrainConfig
from compress.training.forward import Side
from compress.training.loop import Place, Trained
from compress.training.objective import LossTerm
from compress.training.update import OwnResponses


def _some(config: TrainConfig) -> TrainConfig:
    if config.steps == 0:
        raise ValueError("steps is 0, but this stage only trains")
    if config.lr == 0:
        raise ValueError("lr is 0, but this stage only trains weights")
    return config


Terms = tuple[Annotated[SerializeAsAny[LossTerm], BeforeValidator(TERMS.read), TERMS], ...]
Training = Annotated[TrainConfig, AfterValidator(_some)]


class TrainingStage(Stage):
    """The common fields and traits of stages that train a float model."""

    terms: Terms
    """The loss terms. Training minimises their weighted sum."""
    train: TrainConfig
    targets: str | None = added(None)
    """A result of ``seq_kd``. Its targets replace those of ``data.train``."""

    forbids: ClassVar[frozenset[str]] = frozenset({"masked", "quantized", "onnx", "bitsandbytes"})
    trains: ClassVar[bool] = True


class TaughtStage(TrainingStage):
    """A stage that may train with a teacher."""

    teacher: str | None = None
    """The artifact whose outputs the terms compare the student with."""

    def taught_by(self, context: Context) -> Artifact | None:
        """Return the teacher's artifact, if the stage names one."""
        return context.models[self.teacher] if self.teacher else None


def side(artifact: Artifact, model: nn.Module) -> Side:
    """Return a model for the training objective, with the units and layers of its original model (root) it kept."""
    return Side(model, artifact.family(), artifact.manifest.kept, artifact.manifest.layers)


def fit(
    student: Side,
    terms: Sequence[LossTerm],
    config: TrainConfig,
    out: Path,
    context: Context,
    *,
    name: str,
    teacher: Artifact | None = None,
    groups: Mapping[Group, Sequence[nn.Parameter]] | None = None,
    extra: nn.Module | None = None,
    own: OwnResponses | None = None,
) -> Trained:
    """Train the student in place, as :func:`compress.engine.fitting.fit` does, on the data of the run."""
    if not config.total(1):
        return Trained(steps=0)
    data = context.train(name)
    reference = None
    if teacher is not None and any(term.needs_teacher for term in terms):
        reference = side(teacher, teacher.model(device=context.device).requires_grad_(False))
    return engine.fit(
        student,
        terms,
        config,
        Place(out, device=context.device, seed=context.seed, bar=context.bar, name=name),
        data=data,
        evaluate=context.data.eval if context.data else None,
        teacher=reference,
        groups=groups,
        extra=extra,
        own=own,
    )


def finished(source: Artifact, model: nn.Module, out: Path, metrics: Mapping[str, float]) -> Result:
    """Save a model after training of all its weights with an unchanged shape."""
    save_model(model, source, out)
    return Result(
        traits=source.traits, coverage=Coverage.of_training(model), kept=source.manifest.kept, metrics=metrics
    )


def require_ancestor(terms: Sequence[LossTerm], source: Artifact, teacher: Artifact | None) -> None:
    """Raise ModelError for terms that compare unit by unit if the teacher lacks units of the student's root."""
    if teacher is None or (teacher.manifest.root == source.manifest.root and not teacher.manifest.kept):
        return
    for term in terms:
        if term.needs_ancestor:
            raise ModelError(f"{term.type}: the teacher is not the model the student was cut from")
