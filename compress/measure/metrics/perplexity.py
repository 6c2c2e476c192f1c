"""Perplexity of given tokens, and related values that do not depend on the vocabulary."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from compress.errors import CompressError
from compress.measure.metrics.metric import Figure, Metric

if TYPE_CHECKING:
    from compress.data import Split
    from compress.generation.subject import Subject
    from compress.training.progress import Advance

LARGEST = 700
"""Largest nats whose exponential is computed; a much larger one overflows float64."""


def perplexity(subject: Subject, split: Split, batch_size: int, advance: Advance = lambda rows: None) -> dict[str, Any]:
    """exp(nll / tokens) over the labelled tokens of a split. Each one is scored once.

    On running text also ``word_perplexity`` = exp(nll / (words + lines)), and ``bits_per_byte`` and
    ``bits_per_character`` = nll / ln 2 / number of bytes or characters. These do not depend on the vocabulary.
    """
    total, tokens = 0.0, 0
    for batch in split.loader(batch_size):
        nll, count = subject.nll(batch)
        total, tokens = total + nll, tokens + count
        advance(len(batch["input_ids"]))
    if not math.isfinite(total) or total / tokens > LARGEST:
        raise CompressError(f"the model's likelihood of {split.name} is not finite ({total} nats)")
    record: dict[str, Any] = {"perplexity": math.exp(total / tokens), "tokens": tokens}
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


PERPLEXITY = Metric(
    perplexity,
    {
        "perplexity": Figure(better="lower", order=10),
        "word_perplexity": Figure(better="lower", order=11),
        "bits_per_byte": Figure(better="lower", order=12, detail=True),
        "bits_per_character": Figure(better="lower", order=13, detail=True),
        **{name: Figure(condition=True) for name in ("tokens", "words", "context", "stride")},
    },
    reads="logits",
)
