"""Rules that restrict the next token: no repeated n-grams, a minimum length, forced tokens.

Greedy decoding and sampling apply the rules to logits. Beam search applies them to log-probabilities and does not
normalise again. Both follow transformers. All rows have the same length, padding included, and padding counts as text.

Shapes: B rows, T tokens so far, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from compress.errors import UserError
from compress.onnx.runtime.sampling import Options, as_tokens

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Rules:
    """The rules of one generation. Lengths count the prompt and the new tokens."""

    start: int
    """Length of the prompts."""
    longest: int
    shortest: int
    """No row may end below this length."""
    ends: Array
    """The tokens that end a row, [E]."""
    ngram: int
    """Size of the n-grams that may not repeat; 0 means no constraint."""
    first: Array
    """Allowed tokens at position 1; empty means no constraint. For an encoder-decoder this is the first new token."""
    last: Array
    """Allowed tokens at the last position; empty means no constraint."""

    @classmethod
    def of(cls, options: Options, start: int, ends: Iterable[int], vocabulary: int) -> Rules:
        """Rules for prompts of ``start`` tokens. ``ends`` outside the vocabulary never end a row.

        Raises UserError for a forced token outside the vocabulary.
        """
        forced = {}
        for name in ("forced_bos_token_id", "forced_eos_token_id"):
            value = getattr(options, name)
            forced[name] = np.array([token for token in as_tokens(value) if token >= 0], np.int64)
            if (forced[name] >= vocabulary).any():
                raise UserError(f"{name}: {value} is not a token of the vocabulary, 0 to {vocabulary - 1}")
        return cls(
            start=start,
            longest=start + options.max_new_tokens,
            shortest=options.min_length if options.min_new_tokens is None else start + options.min_new_tokens,
            ends=np.array([token for token in ends if 0 <= token < vocabulary], np.int64),
            ngram=options.no_repeat_ngram_size,
            first=forced["forced_bos_token_id"],
            last=forced["forced_eos_token_id"],
        )

    def apply(self, scores: Array, tokens: Array) -> None:
        """Change the scores [B, V] of the next token after tokens [B, T], in place."""
        length = tokens.shape[1]
        if 0 < self.ngram <= length:
            rows, repeated = _repeated(tokens, self.ngram)
            scores[rows, repeated] = -np.inf
        if length < self.shortest:
            scores[:, self.ends] = -np.inf
        if len(self.first) and length == 1:
            _force(scores, self.first)
        if len(self.last) and length == self.longest - 1:
            _force(scores, self.last)

    def ended(self, tokens: Array) -> Array:
        """True at each token that ends a row; any shape."""
        found: Array = (tokens[..., None] == self.ends).any(-1)
        return found


def _force(scores: Array, tokens: Array) -> None:
    scores[...] = -np.inf
    scores[:, tokens] = 0


def _repeated(tokens: Array, size: int) -> tuple[Array, Array]:
    """Pairs of a row and a token that would complete an n-gram that the row already has."""
    starts = tokens.shape[1] - size + 1
    same = np.ones((len(tokens), starts), dtype=bool)
    for offset in range(size - 1):
        same &= tokens[:, offset : offset + starts] == tokens[:, starts + offset, None]
    rows, at = np.nonzero(same)
    return rows, tokens[rows, at + size - 1]
