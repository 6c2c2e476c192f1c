"""Corpus chrF as an ``evaluate`` module. Each import has its own line, because the loader parses them."""

import datasets
import evaluate
from sacrebleu.metrics import CHRF


class Chrf(evaluate.Metric):  # type: ignore[misc]
    """sacreBLEU's chrF2: character n-grams up to 6, beta 2, no word n-grams, several references."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        features = datasets.Features({"predictions": text, "references": datasets.Sequence(text)})
        return evaluate.MetricInfo(
            description="Corpus chrF2 between 0 and 100.",
            citation="Popovic (2015), chrF: character n-gram F-score for automatic MT evaluation.",
            inputs_description="predictions: texts; references: a list of texts for each.",
            features=features,
        )

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, float | str]:
        metric = CHRF()
        most = max(map(len, references))
        streams = [[texts[at] if at < len(texts) else None for texts in references] for at in range(most)]
        result = metric.corpus_score(predictions, streams)
        return {"chrf": result.score, "signature": str(metric.get_signature())}
