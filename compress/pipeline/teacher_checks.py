"""Checks that a student's rows of token ids have the same meaning for its teacher."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from compress.models import context_of
from compress.pipeline.inputs import Inputs
from compress.problem import Problem
from compress.recipe.references import Link
from compress.stages.stage import Shape


def teacher_problems(inputs: Inputs, item: Link, shapes: Mapping[str, Shape]) -> Iterator[Problem]:
    """Yield problems between the teacher of a training stage and the data as its student reads them.

    The vocabularies are compared if both models have a tokenizer. Ready rows of token ids need no tokenizer.
    """
    teacher, student = shapes[item.teacher or item.source], shapes[item.source]
    data, context = inputs.data(item.root), context_of(teacher.config)
    if data and data.train and data.train.model.context > context and data.train.longest > context:
        yield Problem(
            ("teacher",),
            f"{teacher.name!r} accepts at most {context} tokens, but rows of {data.train.name} have "
            f"{data.train.longest}; cut them with {data.train.cutting}",
        )
    pair = [inputs.tokenizer(root) for root in dict.fromkeys((student.root, teacher.root))]
    if len(pair) == 2 and None not in pair and (at := difference(*pair)):
        yield Problem(
            ("teacher",),
            f"{teacher.name!r} has another vocabulary than the student {student.name!r}: "
            f"token {at[0]} is {at[2]!r} for the teacher and {at[1]!r} for the student; "
            "they must use the same vocabulary",
        )


def difference(student: Any, teacher: Any) -> tuple[int, str, str] | None:
    """Return the first id that stands for different tokens. Ids that only one of them has are not a difference."""
    ours, theirs = ({id_: token for token, id_ in each.get_vocab().items()} for each in (student, teacher))
    ids = (id_ for id_ in sorted(ours.keys() & theirs.keys()) if ours[id_] != theirs[id_])
    return next(((id_, ours[id_], theirs[id_]) for id_ in ids), None)
