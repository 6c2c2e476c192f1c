"""ROUGE as an ``evaluate`` module. One import a line: the loader reads them as lists of packages."""

import datasets
import evaluate
from rouge_score import rouge_scorer

KINDS = ("rouge1", "rouge2", "rougeL", "rougeLsum")


class Rouge(evaluate.Metric):  # type: ignore[misc]
    """Mean F1 x 100 (Lin, 2004) over rows, words stemmed; of several references the one that scores highest counts."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        features = datasets.Features({"predictions": text, "references": datasets.Sequence(text)})
        return evaluate.MetricInfo(
            description="ROUGE-1, -2, -L and -Lsum: F1 x 100, the best of several references, mean over rows.",
            citation="Lin (2004), ROUGE: A Package for Automatic Evaluation of Summaries.",
            inputs_description="predictions: texts; references: a list of texts for each. Sentences of Lsum are lines.",
            features=features,
        )

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, float | str]:
        scorer = rouge_scorer.RougeScorer(list(KINDS), use_stemmer=True)
        rows = [
            scorer.score_multi(texts, prediction) for texts, prediction in zip(references, predictions, strict=True)
        ]
        means = {kind: 100 * sum(row[kind].fmeasure for row in rows) / len(rows) for kind in KINDS}
        return {**means, "signature": "rouge_score, F1 x 100, Porter stemmer, best reference"}
