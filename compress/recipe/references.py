"""Resolve and check the source, teacher, targets and result of each stage. No file is opened."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from compress.measure.measurement import Measurement
from compress.problem import Location, Problem, show
from compress.registry import STAGES, suggest
from compress.stages.stage import Stage

GENERATED = "targets"
"""Trait of a result that holds generated targets instead of a model."""
_NO_MODEL = "contains generated targets, not a model; stages that train can use it as targets"

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,79}")
NAME_RULE = "use up to 80 letters, digits, - and _, a letter or digit first"


@dataclass(frozen=True)
class Link:
    """A stage in its recipe: the names it refers to, the names before it, and the traits of its source and result."""

    index: int
    name: str
    stage: Stage
    source: str
    teacher: str | None
    targets: str | None
    root: str
    """The model of the recipe that the source was made from, or the source if it is such a model."""
    before: tuple[str, ...]
    had: frozenset[str]
    """Traits of the source."""
    teacher_traits: frozenset[str]
    targets_traits: frozenset[str]
    traits: frozenset[str]
    """Traits of the result."""

    @property
    def inputs(self) -> dict[str, str]:
        """The names of the artifacts that the result is made from, by their role in the stage."""
        named = {"source": self.source, "teacher": self.teacher, "targets": self.targets}
        return {role: name for role, name in named.items() if name}


def stage_names(stages: Sequence[Stage]) -> list[str]:
    """Return the name of each stage's result: its ``name``, or its type if it has none."""
    return [stage.name or stage.type for stage in stages]


def link(models: Mapping[str, frozenset[str]], stages: Sequence[Stage]) -> list[Link]:
    """Resolve the references of each stage. ``models`` has names and traits. Unknown names stay as written."""
    links: list[Link] = []
    traits, roots = dict(models), {name: name for name in models}
    previous = next(iter(models))
    for index, (stage, name) in enumerate(zip(stages, stage_names(stages), strict=True)):
        source, teacher = stage.source or previous, getattr(stage, "teacher", None)
        targets = getattr(stage, "targets", None)
        had = traits.get(source, frozenset())
        links.append(
            Link(
                index=index,
                name=name,
                stage=stage,
                source=source,
                teacher=teacher,
                targets=targets,
                root=roots.get(source, source),
                before=tuple(traits),
                had=had,
                teacher_traits=traits.get(teacher or "", frozenset()),
                targets_traits=traits.get(targets or "", frozenset()),
                traits=stage.traits_after(had),
            )
        )
        traits[name], roots[name] = links[-1].traits, links[-1].root
        if GENERATED not in links[-1].traits:
            previous = name
    return links


def static_problems(
    models: Mapping[str, frozenset[str]],
    stages: Sequence[Stage],
    measure: Sequence[Measurement],
    unopened: Collection[str] = (),
) -> Iterator[Problem]:
    """Yield every mistake in names, references and order, the earliest stage first.

    ``unopened`` names models that may have more traits than ``models`` lists. Their missing traits are not reported.
    """
    for name, traits in models.items():
        if GENERATED in traits:
            yield Problem(("models", name), "contains generated targets, not a model; name another stage's result")
    taken: dict[str, Location] = {name: ("models", name) for name in models}
    for item in link(models, stages):
        found = chain(_name_problems(item, taken), _reference_problems(item, opened=item.root not in unopened))
        yield from (problem.inside("stages", item.index) for problem in found)
        taken.setdefault(item.name, ("stages", item.index))
    names = [*models, *stage_names(stages)]
    no_models = [item.name for item in link(models, stages) if GENERATED in item.traits]
    for index, measurement in enumerate(measure):
        of = () if measurement.of == "all" else measurement.of
        reference = getattr(measurement, "reference", None)
        for field, name in [*(("of", name) for name in of), *([("reference", reference)] if reference else [])]:
            if name not in names:
                yield Problem(("measure", index, field), f"{name!r} is unknown. {suggest(name, names)}")
            elif name in no_models:
                yield Problem(("measure", index, field), f"{name!r} {_NO_MODEL}")


def _name_problems(item: Link, taken: Mapping[str, Location]) -> Iterator[Problem]:
    if item.name in taken:
        field = "name" if item.stage.name else "type"
        hint = "names must differ" if item.stage.name else "give it a name of its own"
        yield Problem((field,), f"{item.name!r} is also the name of {show(taken[item.name])}; {hint}")
    if item.name == "all":
        yield Problem(("name",), "'all' means every artifact in measurements; use another name")
    if not NAME.fullmatch(item.name):
        yield Problem(("name",), f"{item.name!r} is not a valid name; {NAME_RULE}")


def _reference_problems(item: Link, *, opened: bool) -> Iterator[Problem]:
    for field, name in item.inputs.items():
        if name not in item.before:
            yield Problem((field,), f"{name!r} does not exist before this stage; allowed: {', '.join(item.before)}")
    if GENERATED in item.had:
        yield Problem(("source",), f"{item.source!r} {_NO_MODEL}")
    elif item.source in item.before:
        yield from _trait_problems(item, opened=opened)
    if GENERATED in item.teacher_traits:
        yield Problem(("teacher",), f"{item.teacher!r} {_NO_MODEL}")
    if item.targets in item.before and GENERATED not in item.targets_traits:
        yield Problem(("targets",), f"{item.targets!r} is not the result of a seq_kd stage")
    if "onnx" in item.teacher_traits:
        yield Problem(("teacher",), f"{item.teacher!r} is an ONNX artifact; a teacher must be a torch model")


def _trait_problems(item: Link, *, opened: bool) -> Iterator[Problem]:
    stage = item.stage
    if "onnx" in stage.gives and "bitsandbytes" in item.had:
        yield Problem((), "a bitsandbytes artifact cannot be exported to ONNX; use quantize")
    elif barred := sorted(stage.forbids & item.had):
        yield Problem((), f"{stage.type} cannot work on a model that is {' and '.join(barred)}")
    elif opened and (lacking := sorted(stage.needs - item.had)):
        givers = [name for name in STAGES.names() if STAGES.get(name).gives & set(lacking)]
        yield Problem(
            (),
            f"{stage.type} needs a model that is {' and '.join(lacking)}, but {item.source!r} is not; "
            f"put {' or '.join(givers)} before it or name such a source",
        )
