"""Length of texts."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from compress.measure.metrics.metric import Figure, Metric


def length(
    texts: Sequence[str], references: Sequence[Sequence[str]], *, full: Sequence[bool] | None = None
) -> dict[str, float | str]:
    """Mean and median words of texts and references, their ratio, and shares x 100 of empty and of full texts.

    Words are separated by whitespace. Several references of a row count as their mean. ``full`` contains, for each
    text, whether it has the maximum number of tokens.
    """
    written = [len(text.split()) for text in texts]
    wanted = [statistics.fmean(len(text.split()) for text in row) for row in references]
    found: dict[str, float | str] = {
        "words_mean": statistics.fmean(written),
        "words_median": float(statistics.median(written)),
        "reference_words_mean": statistics.fmean(wanted),
        "reference_words_median": float(statistics.median(wanted)),
        "empty": 100 * sum(not text.strip() for text in texts) / len(written),
    }
    if full is not None:
        found["full_length"] = 100 * sum(full) / len(full)
    if any(wanted):  # there is no ratio if no reference has a word
        found["length_ratio"] = sum(written) / sum(wanted)
    return {**found, "signature": "words between blanks; of several references their mean"}


LENGTH = Metric(
    length,
    {
        "words_mean": Figure(label="mean words", order=90),
        "words_median": Figure(label="median words", order=91),
        "length_ratio": Figure(order=92),
        "empty": Figure(label="empty %", better="lower", order=93),
        "full_length": Figure(label="full length %", better="lower", order=94),
        "reference_words_mean": Figure(condition=True),
        "reference_words_median": Figure(condition=True),
    },
    takes=("full",),
)
