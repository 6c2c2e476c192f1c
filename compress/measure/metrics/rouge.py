"""ROUGE as an ``evaluate`` module. One import a line: the loader reads them as lists of packages."""

import importlib.metadata
import re

import datasets
import evaluate
from rouge_score import rouge_scorer

KINDS = ("rouge1", "rouge2", "rougeL", "rougeLsum")
_STOP = re.compile(r"""([.!?]["'\u201d\u2019)\]]*)\s+""")
_RULES = {"lines": "lines", "stops": "lines, or end in . ! ? and a blank"}


class Rouge(evaluate.Metric):  # type: ignore[misc]
    """Mean F1 x 100 (Lin, 2004) over rows, words stemmed; of several references the one that scores highest counts.

    Words are of a to z and 0 to 9 in lower case, and the stemmer is of English: any other letter ends a word, so that
    texts without a to z score 0, themselves included.

    The sentences of Lsum are ``lines``, as ``rouge_score`` has it, so that it is L where texts have one line; or they
    end at ``stops`` too: . ! or ? with the quotes and brackets that close behind it, and a blank. That rule knows no
    abbreviation; it takes "Mr. Smith" apart alike in texts and references.
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
        # a line break is a blank to all but Lsum
        rows = [scorer.score_multi([lines(text) for text in texts], lines(prediction)) for texts, prediction in pairs]
        means = {kind: 100 * sum(row[kind].fmeasure for row in rows) / len(rows) for kind in KINDS}
        version = importlib.metadata.version("rouge_score")
        settings = f"F1 x 100, words [a-z0-9]+, Porter stemmer, best reference, sentences of Lsum: {_RULES[sentences]}"
        return {**means, "signature": f"rouge_score {version}, {settings}"}
