"""What may come next whatever the model says: repeated n-grams, the least length, forced tokens.

Greedy decoding and sampling apply the rules to logits, beam search to log-probabilities, which it does not normalise
again; both as the stock library does. All rows have one length, padding included, and padding counts as text.

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
    """The rules of one generation; lengths are those of whole rows, prompt and new tokens."""

    start: int
    """Length of the prompts."""
    longest: int
    shortest: int
    """Below this length no row may end."""
    ends: Array
    """Tokens that end a row, [E]."""
    ngram: int
    """Size of n-grams that may not come twice; 0: all may."""
    first: Array
    """Tokens one of which must follow a row of one token (where a decoder has an encoder: come first). None: any."""
    last: Array
    """Tokens one of which must be the last that the length allows. None: any."""

    @classmethod
    def of(cls, options: Options, start: int, ends: Iterable[int], vocabulary: int) -> Rules:
        """Rules for prompts of ``start`` tokens; ``ends`` outside the vocabulary never end a row.

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
        """Change the scores [B, V] of what follows tokens [B, T], in place."""
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
        """Which tokens end a row, of any shape."""
        found: Array = (tokens[..., None] == self.ends).any(-1)
        return found


def _force(scores: Array, tokens: Array) -> None:
    scores[...] = -np.inf
    scores[:, tokens] = 0


def _repeated(tokens: Array, size: int) -> tuple[Array, Array]:
    """Rows, and for each a token that would complete an n-gram which the row already has."""
    starts = tokens.shape[1] - size + 1
    same = np.ones((len(tokens), starts), dtype=bool)
    for offset in range(size - 1):
        same &= tokens[:, offset : offset + starts] == tokens[:, starts + offset, None]
    rows, at = np.nonzero(same)
    return rows, tokens[rows, at + size - 1]
