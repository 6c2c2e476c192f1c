"""Text a model generates for the examples of a split, and the part of it that a report shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from compress.data import Example, Split
from compress.generation.settings import Decoding
from compress.generation.subject import Subject
from compress.training.progress import Advance

SAMPLES = 24
"""Rows whose text is kept, evenly spread: always the same ones, so that runs on the same rows can be compared."""


class Answer(NamedTuple):
    """A generated text, and whether it took all the tokens it might, its end token counted."""

    text: str
    full: bool


def answers(
    subject: Subject,
    tokenizer: Any,
    split: Split,
    decoding: Decoding,
    batch_size: int,
    seed: int,
    advance: Advance = lambda rows: None,
) -> list[Answer]:
    """Return what the model says to each example; examples of like length are generated together.

    ``advance`` is told the rows of each batch that is done.
    """
    order = sorted(range(len(split.examples)), key=lambda at: len(split.examples[at].input_ids))
    said = [Answer("", full=False)] * len(order)
    for number, first in enumerate(range(0, len(order), batch_size)):
        chosen = order[first : first + batch_size]
        found = subject.generate([split.examples[at].input_ids for at in chosen], decoding, seed * 1_000_003 + number)
        for at, ids in zip(chosen, found, strict=True):
            text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()
            said[at] = Answer(text, len(ids) + 1 >= decoding.max_new_tokens)  # a forced end token is no end of its own
        advance(len(chosen))
    return said


def samples(examples: Sequence[Example], texts: Sequence[str]) -> list[dict[str, Any]]:
    """Return at most :data:`SAMPLES` rows, from the first on at equal steps: number, input, references and output."""
    count = min(SAMPLES, len(texts))
    rows = [at * len(texts) // count for at in range(count)]
    return [
        {
            "row": row,
            "input": examples[row].text,
            "references": list(examples[row].references),
            "output": texts[row],
        }
        for row in rows
    ]
