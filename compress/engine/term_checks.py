"""What is wrong with loss terms and a teacher before any work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from compress.training.objective import LossTerm, Outline


class Known(Outline, Protocol):
    """What is known of a student or teacher before any work."""

    @property
    def traits(self) -> frozenset[str]: ...
    @property
    def root(self) -> str: ...


def term_problems(
    terms: Sequence[LossTerm], source: Known, teacher: Known | None, *, masked: bool = False
) -> Iterator[str]:
    """What is wrong with a stage's terms and teacher before any work; ``masked``: masks train."""
    if not terms:
        yield "terms: is empty; give at least one term"
    for i, term in enumerate(terms):
        if term.needs_masks and not masked:
            yield f"terms[{i}] ({term.type}) needs trainable masks, which only learn_masks has"
        elif term.needs_teacher and teacher is None:
            yield f"terms[{i}] ({term.type}) needs a teacher; name one with teacher: NAME"
        elif term.needs_ancestor and teacher is not None and not _has_every_unit(teacher, source):
            yield (
                f"terms[{i}] ({term.type}) compares unit by unit, so the teacher must be {source.root!r}, "
                f"the model this one was made from, or a model trained from it without pruning; it is {teacher.name!r}"
            )
        else:
            yield from (f"terms[{i}] ({term.type}): {text}" for text in term.problems(source, teacher))
    if teacher is not None and teacher.config.vocab_size != source.config.vocab_size:
        yield (
            f"teacher {teacher.name!r} has a vocabulary of {teacher.config.vocab_size} tokens, "
            f"but the student {source.name!r} has {source.config.vocab_size}; they must use the same vocabulary"
        )


def _has_every_unit(teacher: Known, student: Known) -> bool:
    return teacher.root == student.root and "pruned" not in teacher.traits
