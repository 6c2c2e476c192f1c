"""Distinct n-grams (Li et al., 2016, A Diversity-Promoting Objective Function for Neural Conversation Models)."""

from __future__ import annotations

from collections.abc import Sequence

from compress.measure.metrics.metric import Figure, Metric


def distinct(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float | str]:
    """Distinct n-grams / n-grams x 100 over all texts, n from 1 to 3; 0 if there is no n-gram.

    Words are separated by whitespace and keep their case and punctuation. No n-gram crosses rows. The share falls as a
    corpus grows, so compare models on the same rows only. Li et al. divide by the number of words for every n.
    References are not read.
    """
    rows = [text.split() for text in texts]
    scores: dict[str, float | str] = {}
    for n in (1, 2, 3):
        grams = [tuple(row[at : at + n]) for row in rows for at in range(len(row) - n + 1)]
        scores[f"distinct{n}"] = 100 * len(set(grams)) / len(grams) if grams else 0.0
    return {**scores, "signature": "distinct n-grams / n-grams x 100 over the corpus, words between blanks, cased"}


DISTINCT = Metric(
    distinct, {f"distinct{n}": Figure(label=f"distinct-{n}", better="higher", order=70 + n) for n in (1, 2, 3)}
)
