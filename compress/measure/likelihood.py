"""Likelihood of given tokens under a model: perplexity, and agreement with a reference model.

Shapes: N scored positions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from compress.data import Batch, Split
from compress.errors import CompressError, RecipeError
from compress.functional.divergence import forward_kl
from compress.generation.subject import Subject
from compress.models.structure import IGNORE
from compress.training.progress import Advance

Record = dict[str, Any]

LARGEST = 700
"""Largest nats whose exponential is computed; a much larger one overflows float64."""


def perplexity(subject: Subject, split: Split, batch_size: int, advance: Advance = lambda rows: None) -> Record:
    """Score every labelled token of a split once."""
    total, tokens = 0.0, 0
    for batch in split.loader(batch_size):
        nll, count = subject.nll(batch)
        total, tokens = total + nll, tokens + count
        advance(len(batch["input_ids"]))
    if not math.isfinite(total) or total / tokens > LARGEST:
        raise CompressError(f"quality: the model's likelihood of {split.name} is not finite ({total} nats)")
    record: Record = {"perplexity": math.exp(total / tokens), "tokens": tokens}
    if not split.examples and split.model.task == "causal":
        record |= {"context": split.longest, "stride": split.longest}  # blocks do not overlap
    if split.words and split.text:
        bits = total / math.log(2)
        record |= {"words": split.words}
        if total / split.words < LARGEST:
            record["word_perplexity"] = math.exp(total / split.words)
        else:  # text without spaces has few, long words
            record["note"] = f"word perplexity is too large to compute: {tokens / split.words:,.0f} tokens per word"
        record |= {"bits_per_byte": bits / len(split.text.encode()), "bits_per_character": bits / len(split.text)}
    return record


def agreement(
    subject: Subject, reference: Subject, split: Split, batch_size: int, advance: Advance = lambda rows: None
) -> Record:
    """Compare a model's next-token distributions with the reference's, on the scored positions."""
    same, divergence, tokens = 0, 0.0, 0
    for batch in split.loader(batch_size):
        for row in _rows(batch):
            scored = row["labels"] != IGNORE
            mine_NV, theirs_NV = subject.logits(row)[scored], reference.logits(row)[scored]
            if mine_NV.shape != theirs_NV.shape:
                raise RecipeError(
                    f"quality.reference has a vocabulary of {theirs_NV.shape[-1]}, but the model has one of "
                    f"{mine_NV.shape[-1]}"
                )
            same += int((mine_NV.argmax(-1) == theirs_NV.argmax(-1)).sum())
            divergence += float(forward_kl(mine_NV, theirs_NV).double().sum())
            tokens += int(scored.sum())
        advance(len(batch["input_ids"]))
    return {"agreement": 100 * same / tokens, "kl": divergence / tokens}


def _rows(batch: Batch) -> Iterator[Batch]:
    """Yield one row at a time, so that the logits of two models need little memory."""
    for at in range(len(batch["input_ids"])):
        yield {name: tensor[at : at + 1] for name, tensor in batch.items()}
