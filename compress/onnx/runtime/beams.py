"""Beam search over any decoder that takes tokens and lets its rows be chosen anew.

The search is the one of ``generate`` of transformers. A prompt has up to K hypotheses that run, each with the sum of
its log-probabilities; each step ranks their continuations. Those that end among the K best are finished, with the score
sum / length^penalty (length: new tokens, the end token included), and the K best of all finished ones are kept; the K
best of the others run on. A prompt is decided when K are finished and, with ``early_stopping``

- True: at once;
- False: when the best running one, were it to end now, would not beat the worst finished one;
- "never": the same, but a positive penalty counts the greatest length a running one may still reach.

Prompts are searched apart: a decided one leaves the batch. Nothing here stands for a hypothesis that does not exist, so
that the rows of a prompt are fewer than K at the start, and wherever the rules leave fewer.

Shapes: P prompts, R running hypotheses of a prompt, K beams, N candidates, T tokens so far, V tokens of the vocabulary.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from compress.onnx.runtime.logits_processors import Rules
from compress.onnx.runtime.sampling import Options

Array = np.ndarray[Any, Any]
GROUP = 64
"""Tokens of which one maximum is taken before candidates are looked for."""


class Decoder(Protocol):
    """Rows of tokens with what is remembered of them."""

    def feed(self, input_ids: Array, /) -> Array:
        """Append tokens [B, S] and return their logits [B, S, V], which the caller may overwrite."""
        ...

    def reorder(self, rows: Array, /) -> None:
        """Go on with these rows, in this order: a row may be named several times, or not at all."""
        ...


def beam_search(decoder: Decoder, logits: Array, prompts: Array, options: Options, rules: Rules) -> list[Array]:
    """Return the best text of each prompt, the prompt included and the end token too where it has one.

    Args:
        decoder: has been fed the prompts, one row each.
        logits: what follows them, [P, V]; overwritten.
        prompts: [P, T].
        options: ``num_beams``, ``length_penalty`` and ``early_stopping`` are read.
        rules: of these options.
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
        self._kept = max(2, 1 + len(rules.ends)) * options.num_beams  # so many that K of them do not end
        self._finished: list[tuple[float, Array]] = []
        self.texts = prompt[None]
        """Those that run, [R, T]; none once the prompt is decided."""
        self.sums = np.zeros(1)
        """Their log-probabilities, [R], greatest first."""

    def best(self) -> Array:
        """The finished text of the best score."""
        return self._finished[0][1]

    def advance(self, logits: Array) -> Array:
        """Take one step with the logits [R, V] of what follows; return the rows that those now running go on from."""
        _normalise(logits)
        self._rules.apply(logits, self.texts)
        parents, tokens, sums = largest(logits, self.sums, self._kept)
        if not len(sums) and not self._finished:  # the rules leave nothing to say
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
        length = max(1, texts.shape[1] - self._rules.start)  # where no token could follow, the score is the only one
        scores = sums / float(length) ** self._options.length_penalty
        found = [*self._finished, *zip(scores.tolist(), texts, strict=True)]
        self._finished = sorted(found, key=lambda pair: -pair[0])[: self._options.num_beams]

    def _decided(self, running: Array, length: int) -> bool:
        """Whether the running ones, of the given new length, can no longer matter."""
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
    """Return row, token and sum [N] of the continuations that are most probable and possible, N <= ``count``.

    They come in descending order of ``sums``[row] + ``log_probs``[row, token], equal ones in that of row and token;
    [R] and [R, V]. No row is sorted: the ``count``-th largest of the maxima over groups of its tokens is a bound that
    at least ``count`` of its tokens reach, and few others do.
    """
    rows, vocabulary = log_probs.shape
    groups = vocabulary // GROUP
    bounds = np.full((rows, 1), np.finfo(log_probs.dtype).min)  # which leaves out -inf
    if groups >= count:
        maxima = log_probs[:, : groups * GROUP].reshape(rows, GROUP, groups).max(1)
        bounds = np.maximum(bounds, np.partition(maxima, -count)[:, -count, None])
    found = np.flatnonzero(log_probs >= bounds)
    parents, tokens = np.divmod(found, vocabulary)
    totals = sums[parents] + log_probs.ravel()[found]
    order = np.argsort(-totals, kind="stable")[:count]
    return parents[order], tokens[order], totals[order]
