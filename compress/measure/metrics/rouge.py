"""ROUGE as an ``evaluate`` module. Each import has its own line, because the loader parses them."""

import importlib.metadata
import re

import datasets
import evaluate
from rouge_score import rouge_scorer

KINDS = ("rouge1", "rouge2", "rougeL", "rougeLsum")
_STOP = re.compile(r"""([.!?]["'\u201d\u2019)\]]*)\s+""")
_RULES = {"lines": "lines", "stops": "lines, or end in . ! ? and a blank"}


class Rouge(evaluate.Metric):  # type: ignore[misc]
    """Mean F1 x 100 (Lin, 2004) over rows, with stemmed words. Of several references, the highest score counts.

    Words consist of a to z and 0 to 9 in lower case, and the stemmer is for English. Any other letter ends a word. A
    text without these characters scores 0, even against itself.

    With ``lines``, each line is a sentence of Lsum, as in ``rouge_score``. Lsum then equals L for texts of one line.
    With ``stops``, a sentence also ends at . ! or ?, any closing quotes and brackets after it, and a blank. That rule
    does not know abbreviations. It splits "Mr. Smith" in texts and references alike.
    """

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        features = datasets.Features({"predictions": text, "references": datasets.Sequence(text)})
        return evaluate.MetricInfo(
            description="ROUGE-1, -2, -L and -Lsum: F1 x 100, the best of several references, mean over rows.",
            citation="Lin (2004), ROUGE: A Package for Automatic Evaluation of Summaries.",
            inputs_description=(
                "predictions: texts; references: a list of texts for each; "
                "sentences: what ends a sentence of Lsum, lines or stops."
            ),
            features=features,
        )

    def _compute(
        self, predictions: list[str], references: list[list[str]], sentences: str = "lines"
    ) -> dict[str, float | str]:
        def lines(text: str) -> str:
            return _STOP.sub(r"\1\n", text) if sentences == "stops" else text

        scorer = rouge_scorer.RougeScorer(list(KINDS), use_stemmer=True)
        pairs = zip(references, predictions, strict=True)
        # only Lsum treats a line break differently from a blank
        rows = [scorer.score_multi([lines(text) for text in texts], lines(prediction)) for texts, prediction in pairs]
        means = {kind: 100 * sum(row[kind].fmeasure for row in rows) / len(rows) for kind in KINDS}
        version = importlib.metadata.version("rouge_score")
        settings = f"F1 x 100, words [a-z0-9]+, Porter stemmer, best reference, sentences of Lsum: {_RULES[sentences]}"
        return {**means, "signature": f"rouge_score {version}, {settings}"}
