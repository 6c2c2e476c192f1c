"""Beam search over any decoder that takes tokens and can reorder its rows.

The search is that of ``generate`` in transformers. A prompt has up to K running hypotheses, each with the sum of its
log-probabilities. Each step ranks their continuations. A continuation among the K best that ends is finished: its score
is sum / length^penalty, where length counts the new tokens, the end token included. The K best finished hypotheses are
kept, and the K best continuations that do not end go on. A prompt is decided when K hypotheses are finished and

- ``early_stopping`` is True;
- it is False, and the best running hypothesis would not beat the worst finished one if it ended now;
- it is "never", and the same holds with the greatest possible length, where the penalty is positive.

Each prompt is searched on its own and leaves the batch once it is decided. Rows stand for real hypotheses only, so a
prompt has fewer than K rows at the start, and wherever the rules allow fewer continuations.

Shapes: P prompts, R running hypotheses of a prompt, K beams, N candidates, T tokens so far, V tokens of the vocabulary.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from compress.onnx.runtime.sampling import Options, Rules

Array = np.ndarray[Any, Any]
GROUP = 64
"""The search for candidates first takes one maximum over each group of this many tokens."""


class Decoder(Protocol):
    """Rows of tokens with their cache."""

    def feed(self, input_ids: Array, /) -> Array:
        """Append tokens [B, S] and return their logits [B, S, V], which the caller may overwrite."""
        ...

    def reorder(self, rows: Array, /) -> None:
        """Keep these rows, in this order. A row may appear several times, or not at all."""
        ...


def beam_search(decoder: Decoder, logits: Array, prompts: Array, options: Options, rules: Rules) -> list[Array]:
    """Return the best text of each prompt, with the prompt, and with the end token if the text has one.

    Args:
        decoder: already holds the prompts, one row each.
        logits: of the next token, [P, V]; overwritten.
        prompts: [P, T].
        options: the search reads ``num_beams``, ``length_penalty`` and ``early_stopping``.
        rules: the rules of these options.
    """
    searches = [_Search(prompt, options, rules) for prompt in prompts]
    while running := [search for search in searches if len(search.sums)]:
        ends = np.cumsum([len(search.sums) for search in running])
        starts = ends - [len(search.sums) for search in running]
        parents = [search.advance(logits[at:end]) for search, at, end in zip(running, starts, ends, strict=True)]
        rows = np.concatenate([start + chosen for start, chosen in zip(starts, parents, strict=True)])
        if len(rows):
            decoder.reorder(rows)
            logits = decoder.feed(np.concatenate([search.texts[:, -1:] for search in running]))[:, -1]
    return [search.best() for search in searches]


class _Search:
    """The hypotheses of one prompt."""

    def __init__(self, prompt: Array, options: Options, rules: Rules) -> None:
        self._options, self._rules = options, rules
        self._kept = max(2, 1 + len(rules.ends)) * options.num_beams  # enough that at least K do not end
        self._finished: list[tuple[float, Array]] = []
        self.texts = prompt[None]
        """The running hypotheses, [R, T]; empty once the prompt is decided."""
        self.sums = np.zeros(1)
        """Their log-probabilities, [R], in descending order."""

    def best(self) -> Array:
        """Return the finished text with the best score."""
        return self._finished[0][1]

    def advance(self, logits: Array) -> Array:
        """Take one step with the logits [R, V] of the next token; return the rows that running hypotheses continue."""
        _normalise(logits)
        self._rules.apply(logits, self.texts)
        parents, tokens, sums = largest(logits, self.sums, self._kept)
        if not len(sums) and not self._finished:  # the rules allow no token
            self._finish(self.sums, self.texts)
        texts = np.concatenate([self.texts[parents], tokens[:, None]], axis=1)
        ended = self._rules.ended(tokens) | (texts.shape[1] == self._rules.longest)
        beams = self._options.num_beams
        now = np.flatnonzero(ended[:beams])
        self._finish(sums[now], texts[now])
        going = np.flatnonzero(~ended)[:beams]
        if self._decided(sums[going], texts.shape[1] - self._rules.start):
            going = going[:0]
        self.texts, self.sums = texts[going], sums[going]
        return parents[going]

    def _finish(self, sums: Array, texts: Array) -> None:
        length = max(1, texts.shape[1] - self._rules.start)  # without a new token the length must not be 0
        scores = sums / float(length) ** self._options.length_penalty
        found = [*self._finished, *zip(scores.tolist(), texts, strict=True)]
        self._finished = sorted(found, key=lambda pair: -pair[0])[: self._options.num_beams]

    def _decided(self, running: Array, length: int) -> bool:
        """Return True when no running hypothesis, with this many new tokens, can still be among the best."""
        if not len(running):
            return True
        options = self._options
        if len(self._finished) < options.num_beams:
            return False
        if options.early_stopping == "never" and options.length_penalty > 0:
            length = self._rules.longest - self._rules.start
        bound = running[0] / float(length) ** options.length_penalty
        return options.early_stopping is True or bool(bound <= self._finished[-1][0])


def _normalise(logits: Array) -> None:
    """Turn logits [R, V] into log-probabilities, in place: x - max - log sum exp(x - max)."""
    logits -= logits.max(-1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))


def largest(log_probs: Array, sums: Array, count: int) -> tuple[Array, Array, Array]:
    """Return row, token and sum [N] of the most probable continuations that are possible, N <= ``count``.

    They are in descending order of ``sums`` [R] at the row plus ``log_probs`` [R, V] at the row and token; ties are in
    order of row and token. No row is sorted as a whole: the ``count``-th largest of the maxima over groups of tokens is
    a bound that at least ``count`` tokens of the row reach, and few others.
    """
    rows, vocabulary = log_probs.shape
    groups = vocabulary // GROUP
    bounds = np.full((rows, 1), np.finfo(log_probs.dtype).min)  # so -inf is left out
    if groups >= count:
        maxima = log_probs[:, : groups * GROUP].reshape(rows, GROUP, groups).max(1)
        bounds = np.maximum(bounds, np.partition(maxima, -count)[:, -count, None])
    found = np.flatnonzero(log_probs >= bounds)
    parents, tokens = np.divmod(found, vocabulary)
    totals = sums[parents] + log_probs.ravel()[found]
    order = np.argsort(-totals, kind="stable")[:count]
    return parents[order], tokens[order], totals[order]
