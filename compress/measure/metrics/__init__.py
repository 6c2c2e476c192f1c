"""Metrics of ``quality``: one function per file, with the label, direction and order of its values.

Scores are between 0 and 100, except perplexities, bits, nats, the word counts of ``length`` and their ratio.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from compress.registry import METRICS


def score(name: str, predictions: Sequence[str], references: Sequence[Sequence[str]], **taken: Any) -> dict[str, Any]:
    """Return the values of a metric of texts by name. Each prediction is compared with one or several references.

    Args:
        name: the name of the metric.
        predictions: the texts to score.
        references: the reference texts of each prediction. Their number may differ between predictions.
        taken: further arguments of the metric: ``sentences`` of ``rouge``, ``bleu_tokenize`` of ``bleu``,
            ``full`` of ``length``.
    """
    return dict(METRICS.get(name).function(predictions, references, **taken))
