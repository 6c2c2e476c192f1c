"""Check loss terms and a teacher before any training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from compress.problem import Problem
from compress.training.objective import LossTerm, Outline


class Known(Outline, Protocol):
    """Facts about a student or teacher that are known before any training."""

    @property
    def traits(self) -> frozenset[str]: ...
    @property
    def root(self) -> str: ...


def term_problems(
    terms: Sequence[LossTerm], source: Known, teacher: Known | None, *, masked: bool = False
) -> Iterator[Problem]:
    """Yield the problems of a stage's terms and teacher. ``masked`` says whether masks train."""
    if not terms:
        yield Problem(("terms",), "is empty; give at least one term")
    for i, term in enumerate(terms):
        yield from (problem.inside("terms", i) for problem in _problems(term, source, teacher, masked))
    if teacher is not None and teacher.config.vocab_size != source.config.vocab_size:
        yield Problem(
            ("teacher",),
            f"{teacher.name!r} has a vocabulary of {teacher.config.vocab_size} tokens, "
            f"but the student {source.name!r} has {source.config.vocab_size}; they must use the same vocabulary",
        )


def _problems(term: LossTerm, source: Known, teacher: Known | None, masked: bool) -> Iterator[Problem]:
    if term.needs_masks and not masked:
        yield Problem((), f"{term.type} needs trainable masks, which only learn_masks has")
    elif term.needs_teacher and teacher is None:
        yield Problem((), f"{term.type} needs a teacher; name one with teacher: NAME")
    elif term.needs_ancestor and teacher is not None and not _has_every_unit(teacher, source):
        yield Problem(
            (),
            f"{term.type} compares unit by unit, so the teacher must be {source.root!r}, "
            f"the model this one was made from, or a model trained from it without pruning; it is {teacher.name!r}",
        )
    else:
        yield from term.problems(source, teacher)


def _has_every_unit(teacher: Known, student: Known) -> bool:
    return teacher.root == student.root and "pruned" not in teacher.traits
