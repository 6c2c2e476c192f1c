"""ROUGE (Lin, 2004, ROUGE: A Package for Automatic Evaluation of Summaries)."""

from __future__ import annotations

import importlib.metadata
import re
import string
from collections.abc import Sequence

from compress.measure.metrics.metric import Figure, Metric

KINDS = ("1", "2", "L", "Lsum")
_STOP = re.compile(r"""([.!?]["'\u201d\u2019)\]]*)\s+""")
_RULES = {"lines": "lines", "stops": "lines, or end in . ! ? and a blank"}


def rouge(
    texts: Sequence[str], references: Sequence[Sequence[str]], *, sentences: str = "lines"
) -> dict[str, float | str]:
    """ROUGE-1, -2, -L and -Lsum: mean F1 x 100 over rows, with stemmed words and the best of several references.

    Words consist of a to z and 0 to 9 in lower case, and the stemmer is for English. Any other letter ends a word. A
    text without these characters scores 0, even against itself.

    With ``lines``, each line is a sentence of Lsum, as in ``rouge_score``. Lsum then equals L for texts of one line.
    With ``stops``, a sentence also ends at . ! or ?, any closing quotes and brackets after it, and a blank. That rule
    does not know abbreviations. It splits "Mr. Smith" in texts and references alike.
    """
    from rouge_score import rouge_scorer

    def lines(text: str) -> str:
        return _STOP.sub(r"\1\n", text) if sentences == "stops" else text

    kinds = [f"rouge{kind}" for kind in KINDS]
    scorer = rouge_scorer.RougeScorer(kinds, use_stemmer=True)
    pairs = zip(references, texts, strict=True)
    # only Lsum treats a line break differently from a blank
    rows = [scorer.score_multi([lines(reference) for reference in row], lines(text)) for row, text in pairs]
    means = {kind: 100 * sum(row[kind].fmeasure for row in rows) / len(rows) for kind in kinds}
    version = importlib.metadata.version("rouge_score")
    settings = f"F1 x 100, words [a-z0-9]+, Porter stemmer, best reference, sentences of Lsum: {_RULES[sentences]}"
    return {**means, "signature": f"rouge_score {version}, {settings}"}


def problem(references: Sequence[Sequence[str]], name: str) -> str | None:
    """Why ROUGE cannot score: more than half of the rows have letters but none from a to z, which it would ignore.

    Digits alone, which ROUGE still sees, are not enough to score such rows.
    """
    rows = [set("".join(row).lower()) for row in references]
    lost = sum(any(map(str.isalpha, row)) and row.isdisjoint(string.ascii_lowercase) for row in rows)
    if lost <= len(rows) / 2:
        return None
    return (
        f"ROUGE only counts the letters a to z, but {lost} of {len(rows)} rows of {name} have references without one; "
        "measure chrf or bleu"
    )


ROUGE = Metric(
    rouge,
    {f"rouge{kind}": Figure(label=f"ROUGE-{kind}", better="higher", order=40 + at) for at, kind in enumerate(KINDS)},
    takes=("sentences",),
    problem=problem,
)
