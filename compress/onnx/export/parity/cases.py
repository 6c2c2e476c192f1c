"""The inputs of the parity gate, and the logits of the written graph and of the torch model for them.

Shapes: B rows, T tokens, R source tokens, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from compress.onnx.runtime import Runtime
from compress.onnx.runtime.session import Array

LONGEST, STEPS = 32, 6
"""Tokens of the longest row; number of single tokens fed one after another."""


@dataclass(frozen=True)
class Case:
    """Tokens [B, T] with a mask, fed in pieces of these lengths; for an encoder-decoder also a source [B, R]."""

    ids: Array
    mask: Array
    pieces: tuple[int, ...]
    source: Array | None = None
    source_mask: Array | None = None


def cases_of(
    vocabulary: int, context: int, generator: np.random.Generator, *, with_sources: bool = False
) -> Iterator[Case]:
    """Whole rows and rows in pieces, alone and in batches of unequal lengths."""
    longest = min(LONGEST, context)
    half, steps = max(1, longest // 2), min(STEPS, longest)
    for lengths, pieces in (
        ((longest,), (longest,)),
        ((1, 1), (1,)),
        ((half, half - 1, 1), (half,)),
        ((longest, longest - 2, half), (half, 1, 1, longest - half - 2)),
        ((steps,), (1,) * steps),
        ((half + 2, half), (half, 2)),
    ):
        ends = np.minimum(np.cumsum(pieces), longest)  # in a context below 4 some pieces do not fit
        rows = np.clip(lengths, 1, ends[-1])
        mask = (np.arange(ends[-1]) >= ends[-1] - rows[:, None]).astype(np.int64)
        fitting = tuple(int(piece) for piece in np.diff(ends, prepend=0) if piece)
        case = Case(generator.integers(0, vocabulary, mask.shape), mask, fitting)
        yield _with_source(case, rows, vocabulary, generator) if with_sources else case


def _with_source(case: Case, lengths: Array, vocabulary: int, generator: np.random.Generator) -> Case:
    """Add sources of these lengths, padded on the right; the rows themselves have no padding."""
    mask = (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)
    return Case(case.ids, np.ones_like(case.mask), case.pieces, generator.integers(0, vocabulary, mask.shape), mask)


def graph_logits(runtime: Runtime, case: Case) -> Array:
    """Return the logits [B, T, V] of the graph, computed through its cache."""
    starts = np.cumsum((0, *case.pieces))[:-1]
    pieces = [slice(start, start + length) for start, length in zip(starts, case.pieces, strict=True)]
    if case.source is not None:
        response = runtime.answer(case.source, case.source_mask)
        return np.concatenate([response.feed(case.ids[:, at]) for at in pieces], axis=1)
    decoding = runtime.start(*case.ids.shape)
    return np.concatenate([decoding.feed(case.ids[:, at], case.mask[:, at]).copy() for at in pieces], axis=1)


def torch_logits(model: nn.Module, case: Case) -> Array:
    """Return the logits [B, T, V] of the torch model, from one forward pass."""
    inputs: dict[str, Any] = {"input_ids": case.ids, "attention_mask": case.mask}
    if case.source is not None:
        inputs = {"input_ids": case.source, "attention_mask": case.source_mask, "decoder_input_ids": case.ids}
    else:
        inputs["position_ids"] = (case.mask.cumsum(-1) - 1).clip(min=0)
    with torch.no_grad():
        logits: Array = model(**{name: torch.from_numpy(value) for name, value in inputs.items()}).logits.numpy()
    return logits
