"""Corpus chrF (Popovic, 2015, chrF: character n-gram F-score for automatic MT evaluation)."""

from __future__ import annotations

from collections.abc import Sequence

from compress.measure.metrics.bleu import streams
from compress.measure.metrics.metric import Figure, Metric


def chrf(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float | str]:
    """Corpus chrF2 of sacreBLEU between 0 and 100: character n-grams up to 6, beta 2, several references."""
    from sacrebleu.metrics import CHRF as Scorer

    metric = Scorer()
    result = metric.corpus_score(list(texts), streams(references))
    return {"chrf": result.score, "signature": str(metric.get_signature())}


CHRF = Metric(chrf, {"chrf": Figure(label="chrF", better="higher", order=30)})
