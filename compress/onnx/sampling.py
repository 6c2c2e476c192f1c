"""How the next token is chosen from logits, in numpy. Shapes: B rows, V tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from compress.errors import UserError

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Options:
    """Options of generation. The defaults are greedy decoding; ``do_sample`` draws from the distribution that
    ``temperature``, then ``top_k`` (0: off), then ``top_p`` (1: off) leave, with a generator started at ``seed``.

    ``eos_token_id``, or any of several, ends a row; None takes the model's own, and a negative number never ends one.
    """

    max_new_tokens: int = 20
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    eos_token_id: int | Sequence[int] | None = None

    def __post_init__(self) -> None:
        for name, valid, allowed in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature > 0, "above 0"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
        ):
            if not valid:
                raise UserError(f"{name}: {getattr(self, name)} is not {allowed}")


def end_tokens(given: int | Sequence[int] | None) -> list[int]:
    """The tokens that end a row, of which a config may give one, several or none."""
    return [] if given is None else [given] if isinstance(given, int) else list(given)


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
    """The distribution that sampling draws from, [B, V] -> [B, V] float64.

    ``top_k`` keeps the k largest logits and those equal to the k-th; ``top_p`` keeps the smallest set of tokens whose
    probability reaches p, at least one (Holtzman et al., arXiv 1904.09751, section 3.1).
    """
    scores = logits.astype(np.float64) / options.temperature
    if 0 < options.top_k < scores.shape[-1]:
        kth = np.partition(scores, -options.top_k)[:, -options.top_k, None]
        scores = np.where(scores < kth, -np.inf, scores)
    weights: Array = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    if options.top_p < 1:
        order = np.argsort(-weights, axis=-1, kind="stable")
        ordered = np.take_along_axis(weights, order, -1)
        ordered[ordered.cumsum(-1) - ordered >= options.top_p] = 0
        np.put_along_axis(weights, order, ordered, -1)
        weights /= weights.sum(-1, keepdims=True)
    return weights
