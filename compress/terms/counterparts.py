"""Match each student layer to the teacher layer it came from, for terms that compare layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from compress.errors import ModelError
from compress.models import family_of
from compress.problem import Problem


class Deep(Protocol):
    """A model with the layers kept of its original model (root): a dict from stack (encoder or decoder) to layers.

    A stack that is not listed kept all its layers.
    """

    @property
    def config(self) -> Any: ...
    @property
    def layers(self) -> Mapping[str, Sequence[int]]: ...


def counterparts(student: Deep, teacher: Deep, term: str) -> list[int]:
    """Return, for each student layer of the last stack, the teacher layer from the same layer of the root.

    Both models come from one original model (root) and may have dropped layers. Raises ModelError, with the name of the
    ``term``, if the teacher dropped a layer that the student kept.
    """
    ours, theirs = _of_root(student), _of_root(teacher)
    if not (student.layers or teacher.layers) and len(ours) != len(theirs):
        raise ModelError(
            f"{term} needs as many layers in the teacher as in the student: the teacher has "
            f"{len(theirs)}, the student {len(ours)}"
        )
    if missing := [str(layer) for layer in ours if layer not in theirs]:
        few = "layer" if len(missing) == 1 else "layers"
        raise ModelError(
            f"{term} compares layer by layer, and the teacher lacks {few} {', '.join(missing)} of the model that both "
            "descend from; allowed: a teacher that has every layer of the student"
        )
    return [theirs.index(layer) for layer in ours]


def layer_problems(student: Deep, teacher: Deep | None, term: str) -> Iterator[Problem]:
    """Yield the problem that :func:`counterparts` would raise, if any."""
    try:
        if teacher is not None:
            counterparts(student, teacher, term)
    except ModelError as error:
        yield error.problem


def _of_root(model: Deep) -> list[int]:
    stack = family_of(model.config).stacks[-1]
    return list(model.layers.get(stack.name, range(stack.depth(model.config))))
