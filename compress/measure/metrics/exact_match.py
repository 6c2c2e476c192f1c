"""Exact match."""

from __future__ import annotations

from collections.abc import Sequence

from compress.measure.metrics.metric import Figure, Metric


def exact_match(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float | str]:
    """Percentage of texts that equal one of their references, ignoring blanks at both ends."""
    pairs = zip(texts, references, strict=True)
    hits = [text.strip() in {reference.strip() for reference in row} for text, row in pairs]
    return {"exact_match": 100 * sum(hits) / len(hits), "signature": "equal after stripping blanks at the ends"}


EXACT_MATCH = Metric(exact_match, {"exact_match": Figure(better="higher", order=50)})
