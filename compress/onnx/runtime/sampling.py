"""Choose the next token from logits, in numpy. Shapes: B rows, V tokens of the vocabulary."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
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
        """Options from keyword arguments; UserError for one that is unknown or out of range."""
        known = [each.name for each in fields(cls)]
        if unknown := next((name for name in given if name not in known), None):
            raise UserError(f"{unknown}: is not an option of generation; allowed: {', '.join(known)}")
        return cls(**given)

    def _require(self, name: str, valid: bool, allowed: str) -> None:
        if not valid:
            raise UserError(f"{name}: {getattr(self, name)!r} is not {allowed}")


def is_whole(value: object) -> bool:
    """True for a whole number; False for True and False."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def as_tokens(value: int | Sequence[int] | None) -> list[int]:
    """One token, several tokens, or None as a list."""
    return [] if value is None else list(value) if isinstance(value, Sequence) else [value]


def choose(logits: Array, options: Options, generator: np.random.Generator) -> Array:
    """The next token of each row, [B, V] -> [B] int64."""
    if not options.do_sample:
        greedy: Array = logits.argmax(-1)
        return greedy
    cumulative = probabilities(logits, options).cumsum(-1)
    drawn = generator.random((len(logits), 1)) * cumulative[:, -1:]
    sampled: Array = (cumulative <= drawn).sum(-1)
    return sampled


def probabilities(logits: Array, options: Options) -> Array:
    """The probabilities that sampling uses, [B, V] -> [B, V] float64.

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
