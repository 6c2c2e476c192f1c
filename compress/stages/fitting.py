"""What every stage that trains does: bring student, teacher, terms and data together and run the loop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import torch
from pydantic import AfterValidator, BeforeValidator, SerializeAsAny
from torch import nn

from compress.artifact import Artifact, save_model
from compress.errors import ModelError
from compress.models.dropout import set_dropout
from compress.registry import TERMS
from compress.stages.stage import Context, Result, Shape
from compress.surgery.coverage import Coverage
from compress.training.config import Group, TrainConfig
from compress.training.forward import Side
from compress.training.loop import OwnAnswers, Place, Trained, train
from compress.training.objective import LossTerm, Objective


def _some(config: TrainConfig) -> TrainConfig:
    if config.steps == 0:
        raise ValueError("steps is 0, and this stage does nothing but train")
    if config.lr == 0:
        raise ValueError("lr is 0, and this stage does nothing but train weights")
    return config


Terms = tuple[Annotated[SerializeAsAny[LossTerm], BeforeValidator(TERMS.read), TERMS], ...]
Training = Annotated[TrainConfig, AfterValidator(_some)]


def side(artifact: Artifact, model: nn.Module) -> Side:
    """A model as the objective sees it, with the units and layers it kept of its root."""
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
    own: OwnAnswers | None = None,
) -> Trained:
    """Train the student in place.

    ``groups`` names what trains, by default every parameter as weights; ``extra`` is state that must travel with the
    checkpoints; ``own`` answers prompts with the student itself in some of the steps.
    """
    if not config.total(1):
        return Trained(steps=0)
    data = context.train(name)
    reference = None
    if teacher is not None and any(term.needs_teacher for term in terms):
        reference = side(teacher, teacher.model(device=context.device).requires_grad_(False))
    student.model.to(context.device)
    autocast = torch.bfloat16 if config.precision == "bf16" else None
    torch.manual_seed(context.seed)
    objective = Objective(student, terms, teacher=reference, autocast=autocast).to(context.device)
    if extra is not None:
        objective.add_module("extra", extra)
    place = Place(out, device=context.device, seed=context.seed, bar=context.bar, name=name)
    with set_dropout(student.model, config.dropout):
        return train(
            objective,
            groups or {"weights": list(student.model.parameters())},
            data,
            context.data.eval if context.data else None,
            config,
            place,
            own=own,
        )


def finished(source: Artifact, model: nn.Module, out: Path, metrics: Mapping[str, float]) -> Result:
    """Save a model whose weights all trained and whose shape stayed."""
    save_model(model, source, out)
    return Result(
        traits=source.traits, coverage=Coverage.of_training(model), kept=source.manifest.kept, metrics=metrics
    )


def term_problems(
    terms: Sequence[LossTerm], source: Shape, teacher: Shape | None, *, masked: bool = False
) -> Iterator[str]:
    """What is wrong with a stage's terms and teacher before any work; ``masked``: masks train."""
    if not terms:
        yield "terms: is empty; name one term at least"
    for i, term in enumerate(terms):
        if term.needs_masks and not masked:
            yield f"terms[{i}] ({term.type}) needs masks that train; only learn_masks has them"
        elif term.needs_teacher and teacher is None:
            yield f"terms[{i}] ({term.type}) needs a teacher; name one with teacher: NAME"
        elif term.needs_ancestor and teacher is not None and not _has_every_unit(teacher, source):
            yield (
                f"terms[{i}] ({term.type}) compares unit by unit, so the teacher must be {source.root!r}, "
                f"the model this one descends from, or trained from it and not pruned; it is {teacher.name!r}"
            )
        else:
            yield from (f"terms[{i}] ({term.type}): {text}" for text in term.problems(source, teacher))
    if teacher is not None and teacher.config.vocab_size != source.config.vocab_size:
        yield (
            f"teacher {teacher.name!r} has a vocabulary of {teacher.config.vocab_size} tokens, "
            f"the student {source.name!r} of {source.config.vocab_size}; they must share one"
        )


def _has_every_unit(teacher: Shape, student: Shape) -> bool:
    return teacher.root == student.root and "pruned" not in teacher.traits


def require_ancestor(terms: Sequence[LossTerm], source: Artifact, teacher: Artifact | None) -> None:
    """Refuse terms that compare unit by unit with a teacher that lacks units of the student's root."""
    if teacher is None or (teacher.manifest.root == source.manifest.root and not teacher.manifest.kept):
        return
    for term in terms:
        if term.needs_ancestor:
            raise ModelError(f"{term.type}: the teacher is not the model the student was cut from")
