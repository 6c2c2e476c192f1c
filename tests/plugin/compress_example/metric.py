"""A metric of generated text: how often a word follows itself."""

from collections.abc import Sequence

from compress.measure.metrics.metric import Figure, Metric


def repetition(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float | str]:
    """Percentage of words that equal the word before them, over all texts; 0 without any such pair of words."""
    pairs = [pair for text in texts for pair in zip(text.split(), text.split()[1:], strict=False)]
    share = 100 * sum(first == second for first, second in pairs) / len(pairs) if pairs else 0.0
    return {"repetition": share, "signature": "words between blanks, cased"}


REPETITION = Metric(repetition, {"repetition": Figure(label="repeated words %", better="lower", order=75)})
