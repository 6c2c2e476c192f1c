"""Length statistics as an ``evaluate`` module. Each import has its own line, because the loader parses them."""

import statistics

import datasets
import evaluate


class Length(evaluate.Metric):  # type: ignore[misc]
    """Lengths of texts and references, in words separated by whitespace. A row counts the mean of its references."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        features = datasets.Features({"predictions": text, "references": datasets.Sequence(text)})
        return evaluate.MetricInfo(
            description="Mean and median words of predictions and references, their ratio, and shares x 100 of rows.",
            citation="",
            inputs_description=(
                "predictions: texts; references: a list of texts for each; "
                "full, where it is known: for each prediction, whether it took all tokens it might."
            ),
            features=features,
        )

    def _compute(
        self, predictions: list[str], references: list[list[str]], full: list[bool] | None = None
    ) -> dict[str, float | str]:
        written = [len(text.split()) for text in predictions]
        wanted = [statistics.fmean(len(text.split()) for text in texts) for texts in references]
        found: dict[str, float | str] = {
            "words_mean": statistics.fmean(written),
            "words_median": float(statistics.median(written)),
            "reference_words_mean": statistics.fmean(wanted),
            "reference_words_median": float(statistics.median(wanted)),
            "empty": 100 * sum(not text.strip() for text in predictions) / len(written),
        }
        if full is not None:
            found["full_length"] = 100 * sum(full) / len(full)
        if any(wanted):  # there is no ratio if no reference has a word
            found["length_ratio"] = sum(written) / sum(wanted)
        return {**found, "signature": "words between blanks; of several references their mean"}
