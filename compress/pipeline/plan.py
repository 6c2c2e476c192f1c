"""Plan a run, and find every problem that can be found without training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import torch

from compress.distributed import processes
from compress.models import family_of
from compress.models.loading import build
from compress.models.structure import count_parameters
from compress.pipeline.inputs import Inputs
from compress.pipeline.target_checks import answer_problems, longest_answer
from compress.pipeline.teacher_checks import teacher_problems
from compress.pipeline.workdir import require_no_file
from compress.problem import Problem
from compress.recipe.references import GENERATED, Link, link, static_problems
from compress.stages.stage import Shape, Stage
from compress.training.objective import StateTerm


@dataclass(frozen=True)
class Row:
    """One line of the plan: a model or a stage, and the known properties of its result."""

    name: str
    type: str
    source: str = ""
    teacher: str = ""
    traits: tuple[str, ...] = ()
    parameters: int | None = None
    steps: str = ""
    note: str = ""
    """A remark on the result that its traits do not express."""
    state: str = ""
    """``given``, ``built``, ``reused``, ``continued`` or ``runs``."""


@dataclass(frozen=True)
class Plan:
    """A resolved recipe that passed every check: one row per model, then one per stage."""

    inputs: Inputs
    links: tuple[Link, ...]
    rows: tuple[Row, ...]


def make_plan(inputs: Inputs) -> Plan:
    """Check everything in a recipe that needs no training. Raise :class:`RecipeError` at the first mistake."""
    recipe = inputs.recipe
    require_no_file(inputs.workdir)
    shapes = {name: inputs.shape(name) for name in recipe.models}
    traits = {name: shape.traits for name, shape in shapes.items()}
    if problem := next(static_problems(traits, recipe.stages, recipe.measure), None):
        raise recipe.error(problem)
    links = tuple(link(traits, recipe.stages))
    _check_data(inputs, links)
    for item in links:
        teacher = shapes[item.teacher] if item.teacher else None
        found = [item.stage.problems(shapes[item.source], teacher), answer_problems(inputs, item, links, shapes)]
        if teacher and trains(item.stage):
            found.append(teacher_problems(inputs, item, shapes))
        if trains(item.stage):
            found.append(_room_problems(inputs, item, links))
        if problem := next(chain.from_iterable(found), None):
            raise recipe.error(problem.inside("stages", item.index))
        shapes[item.name] = item.stage.shape(shapes[item.source])
    _check_measurements(inputs, shapes)
    return Plan(inputs, links, (*_model_rows(inputs, shapes), *_stage_rows(inputs, links, shapes)))


def _check_data(inputs: Inputs, links: tuple[Link, ...]) -> None:
    recipe = inputs.recipe
    for item in links:
        if trains(item.stage) and (recipe.data is None or recipe.data.train is None):
            text = f"{item.stage.type} trains, but the recipe has no data.train"
            raise recipe.error(Problem(("stages", item.index), text))
    for index, measurement in enumerate(recipe.measure):
        if measurement.needs_data and (recipe.data is None or not (recipe.data.test or recipe.data.eval)):
            text = f"{measurement.type} needs data.test or data.eval, but the recipe has neither"
            raise recipe.error(Problem(("measure", index), text))
    for name in recipe.models:
        inputs.data(name)
    for item in links:
        if trains(item.stage):
            _check_share(inputs, item)


def _check_share(inputs: Inputs, item: Link) -> None:
    """Raise an error unless every process gets at least one sequence of each batch."""
    data, train = inputs.data(item.root), getattr(item.stage, "train", None)
    if data is None or data.train is None or train is None:
        return
    batch = min(train.batch, len(data.train))
    if batch < processes.count():
        text = f"{batch} sequences cannot be shared by {processes.count()} processes; start at most {batch}"
        raise inputs.recipe.error(Problem(("stages", item.index, "train", "batch"), text))


def _room_problems(inputs: Inputs, item: Link, links: Sequence[Link]) -> Iterator[Problem]:
    """Yield problems of terms that store values for each row of the data, given the number of rows."""
    data = inputs.data(item.root)
    for i, term in enumerate(getattr(item.stage, "terms", ())):
        if data and data.train and isinstance(term, StateTerm) and term.numbered:
            longest = longest_answer(inputs, item, links) or data.train.longest_target
            found = term.room_problems(len(data.train), longest)
            yield from (problem.inside("terms", i) for problem in found)


def _check_measurements(inputs: Inputs, shapes: Mapping[str, Shape]) -> None:
    recipe = inputs.recipe
    for index, measurement in enumerate(recipe.measure):
        every = [name for name, shape in shapes.items() if GENERATED not in shape.traits]
        for name in every if measurement.of == "all" else measurement.of:
            data = inputs.data(shapes[name].root)
            if problem := next(measurement.problems({name: shapes[name].config}, data), None):
                raise recipe.error(problem.inside("measure", index))


def trains(stage: Stage) -> bool:
    """Return whether a stage will read ``data.train``. A training stage does, unless it has zero steps."""
    return stage.trains and getattr(getattr(stage, "train", None), "steps", None) != 0


def _model_rows(inputs: Inputs, shapes: Mapping[str, Shape]) -> Iterator[Row]:
    for name, spec in inputs.recipe.models.items():
        state = "given" if spec.path is not None else "reused" if inputs.model(name) else "built"
        shape = shapes[name]
        traits = tuple(sorted(shape.traits))
        yield Row(name, "model", spec.path or "config", "", traits, _parameters(shape), note=shape.note, state=state)


def _stage_rows(inputs: Inputs, links: tuple[Link, ...], shapes: Mapping[str, Shape]) -> Iterator[Row]:
    known = {name: artifact for name in inputs.recipe.models if (artifact := inputs.model(name))}
    for item in links:
        state = "runs"
        if known.keys() >= set(item.inputs.values()):
            slot = inputs.stage_slot(item, known)
            if artifact := inputs.finished(slot):
                known[item.name], state = artifact, "reused"
            elif slot.partial.exists():
                state = "continued"
        yield Row(
            name=item.name,
            type=item.stage.type,
            source=item.source,
            teacher=item.teacher or "",
            traits=tuple(sorted(item.traits)),
            parameters=None if GENERATED in item.traits else _parameters(shapes[item.name]),
            steps=_steps(item.stage),
            note="; ".join(filter(None, [shapes[item.name].note, item.targets and f"targets {item.targets}"])),
            state=state,
        )


def _parameters(shape: Shape) -> int:
    with torch.device("meta"):
        model = build(shape.config)
    return int(count_parameters(model, family_of(shape.config).axes(shape.config), shape.sizes))


def _steps(stage: Stage) -> str:
    train = getattr(stage, "train", None)
    if train is None:
        return ""
    return f"{train.steps:,}" if train.steps is not None else f"{train.epochs:g} epochs"
