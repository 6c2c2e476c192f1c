"""Corpus BLEU as an ``evaluate`` module. Each import has its own line, because the loader parses them."""

import datasets
import evaluate
from sacrebleu.metrics import BLEU


class Bleu(evaluate.Metric):  # type: ignore[misc]
    """sacreBLEU: cased, exponential smoothing, several references. ``tokenize`` is one of its tokenizers."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        features = datasets.Features({"predictions": text, "references": datasets.Sequence(text)})
        return evaluate.MetricInfo(
            description="Corpus BLEU between 0 and 100.",
            citation="Post (2018), A Call for Clarity in Reporting BLEU Scores.",
            inputs_description="predictions: texts; references: a list of texts for each; tokenize: how to find words.",
            features=features,
        )

    def _compute(
        self, predictions: list[str], references: list[list[str]], tokenize: str = "13a"
    ) -> dict[str, float | str]:
        metric = BLEU(tokenize=tokenize)
        most = max(map(len, references))
        streams = [[texts[at] if at < len(texts) else None for texts in references] for at in range(most)]
        result = metric.corpus_score(predictions, streams)
        return {"bleu": result.score, "signature": str(metric.get_signature())}
