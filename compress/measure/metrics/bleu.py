"""Corpus BLEU as an ``evaluate`` module. One import a line: the loader reads them as lists of packages."""

import datasets
import evaluate
from sacrebleu.metrics import BLEU


class Bleu(evaluate.Metric):  # type: ignore[misc]
    """sacreBLEU with its defaults: cased, tokenized by 13a, exponential smoothing; several references at once."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        features = datasets.Features({"predictions": text, "references": datasets.Sequence(text)})
        return evaluate.MetricInfo(
            description="Corpus BLEU between 0 and 100.",
            citation="Post (2018), A Call for Clarity in Reporting BLEU Scores.",
            inputs_description="predictions: texts; references: a list of texts for each.",
            features=features,
        )

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, float | str]:
        metric = BLEU()
        most = max(map(len, references))
        streams = [[texts[at] if at < len(texts) else None for texts in references] for at in range(most)]
        result = metric.corpus_score(predictions, streams)
        return {"bleu": result.score, "signature": str(metric.get_signature())}
