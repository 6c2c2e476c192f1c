"""Text a model generates for the examples of a split."""

from __future__ import annotations

from typing import Any

from compress.data import Split
from compress.measure.decoding import Decoding
from compress.measure.subject import Subject


def answers(
    subject: Subject, tokenizer: Any, split: Split, decoding: Decoding, batch_size: int, seed: int
) -> list[str]:
    """Return what the model says to each example; examples of like length are generated together."""
    order = sorted(range(len(split.examples)), key=lambda at: len(split.examples[at].input_ids))
    texts = [""] * len(order)
    for number, first in enumerate(range(0, len(order), batch_size)):
        chosen = order[first : first + batch_size]
        found = subject.generate([split.examples[at].input_ids for at in chosen], decoding, seed * 1_000_003 + number)
        for at, ids in zip(chosen, found, strict=True):
            texts[at] = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()
    return texts
