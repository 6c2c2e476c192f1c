"""Corpus BLEU (Post, 2018, A Call for Clarity in Reporting BLEU Scores)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from compress.measure.metrics.metric import Figure, Metric

Tokenizer = Literal["13a", "intl", "zh", "char", "none"]


def bleu(
    texts: Sequence[str], references: Sequence[Sequence[str]], *, bleu_tokenize: Tokenizer = "13a"
) -> dict[str, float | str]:
    """Corpus BLEU of sacreBLEU between 0 and 100: cased, exponential smoothing, several references.

    A score with a tokenizer other than 13a has the tokenizer in its name, as in ``bleu_zh``, because scores with
    different tokenizers cannot be compared.
    """
    from sacrebleu.metrics import BLEU as Scorer

    metric = Scorer(tokenize=bleu_tokenize)
    result = metric.corpus_score(list(texts), streams(references))
    name = "bleu" if bleu_tokenize == "13a" else f"bleu_{bleu_tokenize}"
    return {name: result.score, "signature": str(metric.get_signature())}


def streams(references: Sequence[Sequence[str]]) -> list[list[str | None]]:
    """Return references as sacreBLEU reads them: the first of each text, then the second, and None for missing ones."""
    most = max(map(len, references))
    return [[row[at] if at < len(row) else None for row in references] for at in range(most)]


BLEU = Metric(
    bleu,
    {
        "bleu": Figure(label="BLEU", better="higher", order=20),
        **{
            f"bleu_{name}": Figure(label=f"BLEU {name}", better="higher", order=20 + at)
            for at, name in enumerate(get_args(Tokenizer))
            if at
        },
    },
    takes=("bleu_tokenize",),
)
