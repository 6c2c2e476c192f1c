"""Distinct n-grams as an ``evaluate`` module. Each import has its own line, because the loader parses them."""

import datasets
import evaluate


class Distinct(evaluate.Metric):  # type: ignore[misc]
    """Distinct n-grams / n-grams x 100 over all predictions, n from 1 to 3; 0 if there is no n-gram.

    Words are separated by whitespace and keep their case and punctuation. No n-gram crosses rows. The share falls as a
    corpus grows, so compare models on the same rows only. Li et al. divide by the number of words for every n.
    """

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        features = datasets.Features({"predictions": text, "references": datasets.Sequence(text)})
        return evaluate.MetricInfo(
            description="Distinct 1-, 2- and 3-grams / n-grams x 100 over the corpus.",
            citation="Li et al. (2016), A Diversity-Promoting Objective Function for Neural Conversation Models.",
            inputs_description="predictions: texts; references are not read.",
            features=features,
        )

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, float | str]:
        rows = [text.split() for text in predictions]
        scores: dict[str, float | str] = {}
        for n in (1, 2, 3):
            grams = [tuple(row[at : at + n]) for row in rows for at in range(len(row) - n + 1)]
            scores[f"distinct{n}"] = 100 * len(set(grams)) / len(grams) if grams else 0.0
        return {**scores, "signature": "distinct n-grams / n-grams x 100 over the corpus, words between blanks, cased"}
