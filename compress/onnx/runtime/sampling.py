"""Choose the next token from logits, in numpy: the options of generation, rules that restrict the choice, sampling.

Rules: no repeated n-grams, a minimum length, forced tokens. Greedy decoding and sampling apply them to logits. Beam
search applies them to log-probabilities and does not normalise again. Both follow transformers. All rows have the same
length, padding included, and padding counts as text.

Shapes: B rows, T tokens so far, V tokens of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, Literal

import numpy as np

from compress.errors import UserError

Array = np.ndarray[Any, Any]
MOST_PENALTY = 50
"""A length to a larger power leaves the range of float64."""
LEAST_TEMPERATURE = 1e-6
"""For text that torch may also sample: torch divides float32 logits, and a smaller temperature makes them infinite."""
_LEAST = {"max_new_tokens": 1, "top_k": 0, "seed": 0, "num_beams": 1, "no_repeat_ngram_size": 0, "min_length": 0}
_RANGES: tuple[tuple[str, str, Callable[[float], bool]], ...] = (
    ("temperature", "above 0", lambda value: 0 < value < math.inf),
    ("top_p", "above 0 and at most 1", lambda value: 0 < value <= 1),
    ("length_penalty", f"between ±{MOST_PENALTY}", lambda value: abs(value) <= MOST_PENALTY),
)


@dataclass(frozen=True)
class Options:
    """Options of generation, with the meaning they have in ``generate`` of transformers. The defaults decode greedily.

    ``do_sample`` samples after ``temperature``, then ``top_k`` (0: off), then ``top_p`` (1: off), with a generator
    seeded by ``seed``. ``num_beams`` above 1 selects beam search, which reads ``length_penalty`` and ``early_stopping``
    (see :mod:`compress.onnx.runtime.beams`).

    ``eos_token_id``, one or several, ends a row. ``forced_bos_token_id`` is the first new token, and
    ``forced_eos_token_id`` the last one that the length allows. None takes the model's own setting; a negative number
    means no token. ``min_length`` counts the prompt. ``min_new_tokens`` does not, and takes precedence.
    """

    max_new_tokens: int = 20
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    eos_token_id: int | Sequence[int] | None = None
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    no_repeat_ngram_size: int = 0
    min_length: int = 0
    min_new_tokens: int | None = None
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | Sequence[int] | None = None

    def __post_init__(self) -> None:
        for name, least in (_LEAST if self.min_new_tokens is None else _LEAST | {"min_new_tokens": 0}).items():
            value = getattr(self, name)
            whole = is_whole(value) and int(value) >= least
            self._require(name, whole, f"a whole number of at least {least}")
        for name in ("eos_token_id", "forced_bos_token_id", "forced_eos_token_id"):
            tokens = as_tokens(getattr(self, name))
            self._require(name, all(map(is_whole, tokens)), "a token id, or several")
        self._require("do_sample", isinstance(self.do_sample, bool | np.bool_), "True or False")
        for name, allowed, valid in _RANGES:
            value = getattr(self, name)
            number = isinstance(value, Real) and not isinstance(value, bool)
            self._require(name, number and valid(float(value)), f"a number {allowed}")
        known = isinstance(self.early_stopping, bool) or self.early_stopping == "never"
        self._require("early_stopping", known, "True, False or 'never'")
        self._require(
            "num_beams", self.num_beams == 1 or not self.do_sample, "1, the only number allowed with do_sample"
        )

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> Options:
        """Read options from keyword arguments; UserError for one that is unknown or out of range."""
        known = [each.name for each in fields(cls)]
        if unknown := next((name for name in given if name not in known), None):
            raise UserError(f"{unknown}: is not an option of generation; allowed: {', '.join(known)}")
        return cls(**given)

    def _require(self, name: str, valid: bool, allowed: str) -> None:
        if not valid:
            raise UserError(f"{name}: {getattr(self, name)!r} is not {allowed}")


def is_whole(value: object) -> bool:
    """Return True for a whole number; False for True and False."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def as_tokens(value: int | Sequence[int] | None) -> list[int]:
    """Return one token, several tokens, or None as a list."""
    return [] if value is None else list(value) if isinstance(value, Sequence) else [value]


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
        """Return rules for prompts of ``start`` tokens. ``ends`` outside the vocabulary never end a row.

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
        """Return True at each token that ends a row; any shape."""
        found: Array = (tokens[..., None] == self.ends).any(-1)
        return found


def choose(logits: Array, options: Options, generator: np.random.Generator) -> Array:
    """Return the next token of each row, [B, V] -> [B] int64."""
    if not options.do_sample:
        greedy: Array = logits.argmax(-1)
        return greedy
    cumulative = probabilities(logits, options).cumsum(-1)
    drawn = generator.random((len(logits), 1)) * cumulative[:, -1:]
    sampled: Array = (cumulative <= drawn).sum(-1)
    return sampled


def probabilities(logits: Array, options: Options) -> Array:
    """Return the probabilities that sampling uses, [B, V] -> [B, V] float64.

    ``top_k`` keeps the k largest logits and those equal to the k-th; ``top_p`` keeps the smallest set of tokens whose
    probability reaches p, at least one (Holtzman et al., arXiv 1904.09751, section 3.1).
    """
    scores = logits.astype(np.float64)
    with np.errstate(over="ignore"):  # a logit too far below the largest gets probability 0
        scores = (scores - scores.max(-1, keepdims=True)) / options.temperature
    if 0 < options.top_k < scores.shape[-1]:
        kth = np.partition(scores, -options.top_k)[:, -options.top_k, None]
        scores = np.where(scores < kth, -np.inf, scores)
    weights: Array = np.exp(scores)
    weights /= weights.sum(-1, keepdims=True)
    if options.top_p < 1:
        order = np.argsort(-weights, axis=-1, kind="stable")
        ordered = np.take_along_axis(weights, order, -1)
        ordered[ordered.cumsum(-1) - ordered >= options.top_p] = 0
        np.put_along_axis(weights, order, ordered, -1)
        weights /= weights.sum(-1, keepdims=True)
    return weights


def _force(scores: Array, tokens: Array) -> None:
    scores[...] = -np.inf
    scores[:, tokens] = 0


def _repeated(tokens: Array, size: int) -> tuple[Array, Array]:
    """Return pairs of a row and a token that would complete an n-gram that the row already has."""
    starts = tokens.shape[1] - size + 1
    same = np.ones((len(tokens), starts), dtype=bool)
    for offset in range(size - 1):
        same &= tokens[:, offset : offset + starts] == tokens[:, starts + offset, None]
    rows, at = np.nonzero(same)
    return rows, tokens[rows, at + size - 1]
