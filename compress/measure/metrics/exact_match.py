"""Exact match as an ``evaluate`` module. Each import has its own line, because the loader parses them."""

import datasets
import evaluate


class ExactMatch(evaluate.Metric):  # type: ignore[misc]
    """Percentage of predictions that equal one of their references, ignoring blanks at both ends."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        features = datasets.Features({"predictions": text, "references": datasets.Sequence(text)})
        return evaluate.MetricInfo(
            description="Share of predictions equal to a reference, between 0 and 100.",
            citation="",
            inputs_description="predictions: texts; references: a list of texts for each.",
            features=features,
        )

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, float | str]:
        pairs = zip(predictions, references, strict=True)
        hits = [text.strip() in {reference.strip() for reference in texts} for text, texts in pairs]
        return {"exact_match": 100 * sum(hits) / len(hits), "signature": "equal after stripping blanks at the ends"}
