"""The gate of an export: does the written graph compute what the torch model computes?

Logits are compared on whole sequences and through the cache, with left padding, single tokens and several tokens on a
past; then greedy text. A quantized graph passes three tests:

1. each packed product alone, with 8-bit inputs, within 1e-5 (:mod:`compress.onnx.product_parity`);
2. the whole graph with the products' inputs left in float32, within the limit of float graphs;
3. the whole graph as it is. Here float32 sums in another order can tip the rounding of some 8-bit input by one step,
   which moves the inputs of every later layer: two honest evaluations differ by as much as quantizing the inputs does.
   The limit is 1e-3 of the logits' range or three times the effect of quantizing the inputs, whichever is more.

Shapes: B rows, T tokens, V tokens of the vocabulary.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from compress.errors import ParityError
from compress.onnx.graph import save
from compress.onnx.names import MODEL_FILE
from compress.onnx.product_parity import product_errors
from compress.onnx.runtime import Runtime
from compress.onnx.session import Array
from compress.surgery.quantize import Product, QuantizationSpec

FLOAT_LIMIT, PACKED_LIMIT = 1e-4, 1e-3
"""Largest logit error, in parts of the range of the reference's logits."""
ROUNDING_LIMIT = 3.0
"""Largest logit error of a packed graph, in parts of the effect of quantizing the inputs of products."""
PRODUCT_LIMIT = 1e-5
LONGEST, STEPS, NEW_TOKENS = 32, 6, 16
"""Tokens of the longest row, single tokens fed one after another, tokens of greedy text."""


@dataclass(frozen=True)
class _Case:
    """Tokens [B, T] with a mask, fed in pieces of the given lengths."""

    ids: Array
    mask: Array
    pieces: tuple[int, ...]


@dataclass(frozen=True)
class _Comparison:
    """The largest error over positions that are not padding, and torch's logits there, [positions, V]."""

    error: float
    reference: Array

    @property
    def spread(self) -> float:
        """The range of the reference's logits; of one token's, which may all be the same, the range with zero."""
        return float(np.ptp(self.reference if self.reference.shape[-1] > 1 else np.append(self.reference, 0)))


def check_parity(
    model: nn.Module, directory: Path, spec: QuantizationSpec | None = None, *, seed: int = 0
) -> dict[str, float]:
    """Compare ``model.onnx`` in a directory with the torch model it was made from, as that is deployed.

    Returns:
        ``max_logit_error``, its ``limit``, ``logit_range``, ``positions`` compared, ``greedy_tokens`` compared and
        ``greedy_undecided`` (tokens whose two best logits lie within twice the error, where text may differ); for a
        quantized model also ``products``, ``max_product_error`` (relative), ``max_float_logit_error`` (inputs of
        products in float32) and its ``float_limit``.

    Raises:
        ParityError: with the number and the limit.
    """
    runtime = Runtime.open(directory)
    generator = np.random.default_rng(seed)
    vocabulary: int = model.config.vocab_size  # type: ignore[union-attr, assignment]
    cases = list(_cases(vocabulary, runtime.context, generator))
    compared = _compare(model, runtime, cases)
    limit = FLOAT_LIMIT * compared.spread
    prompts = generator.integers(0, vocabulary, (2, min(8, runtime.context // 2)))
    figures: dict[str, float] = {}
    if spec is not None:
        figures = _products(model, directory, spec)
        with float_activations(model), _float_twin(directory) as twin:
            floats = _compare(model, twin, cases)
            float_limit = FLOAT_LIMIT * floats.spread
            _require("logits with float inputs of products differ", floats.error, float_limit)
            _greedy(model, twin, floats.error, prompts)  # whose error leaves hardly a token undecided
        figures |= {"max_float_logit_error": floats.error, "float_limit": float_limit}
        effect = float(np.abs(compared.reference - floats.reference).max())
        limit = max(PACKED_LIMIT * compared.spread, ROUNDING_LIMIT * effect)
    _require("logits differ", compared.error, limit)
    figures |= {"max_logit_error": compared.error, "limit": limit, "logit_range": compared.spread}
    return figures | {"positions": len(compared.reference)} | _greedy(model, runtime, compared.error, prompts)


def _require(what: str, error: float, limit: float) -> None:
    if not error <= limit:
        raise ParityError(f"{MODEL_FILE}: {what} from torch by {error:.3g}, limit {limit:.3g}")


def _products(model: nn.Module, directory: Path, spec: QuantizationSpec) -> dict[str, float]:
    errors = dict(product_errors(onnx.load(directory / MODEL_FILE), model, spec.matrices))
    for module, error in errors.items():
        _require(f"{module} differs relatively", error, PRODUCT_LIMIT)
    return {"products": len(errors), "max_product_error": max(errors.values())}


@contextmanager
def float_activations(model: nn.Module) -> Iterator[None]:
    """Let the packed products of a torch model take their inputs as they are."""
    specs = {module: module.spec for module in model.modules() if isinstance(module, Product)}
    try:
        for module, spec in specs.items():
            module.spec = spec.model_copy(update={"activations": "none"})
        yield
    finally:
        for module, spec in specs.items():
            module.spec = spec


@contextmanager
def _float_twin(directory: Path) -> Iterator[Runtime]:
    """The same graph and weights, but the products compute with float32 inputs (``accuracy_level`` 1)."""
    graph = onnx.load(directory / MODEL_FILE)
    for node in graph.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 1
    with TemporaryDirectory() as temporary:
        shutil.copyfile(directory / "config.json", Path(temporary) / "config.json")
        save(graph, Path(temporary) / MODEL_FILE)
        yield Runtime.open(temporary)


def _cases(vocabulary: int, context: int, generator: np.random.Generator) -> Iterator[_Case]:
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
        ends = np.minimum(np.cumsum(pieces), longest)  # below a context of 4 some pieces do not fit
        rows = np.clip(lengths, 1, ends[-1])
        mask = (np.arange(ends[-1]) >= ends[-1] - rows[:, None]).astype(np.int64)
        fitting = tuple(int(piece) for piece in np.diff(ends, prepend=0) if piece)
        yield _Case(generator.integers(0, vocabulary, mask.shape), mask, fitting)


def _compare(model: nn.Module, runtime: Runtime, cases: Iterable[_Case]) -> _Comparison:
    errors, references = [], []
    for case in cases:
        real = case.mask == 1
        reference = _torch_logits(model, case.ids, case.mask)[real]
        references.append(reference)
        errors.append(float(np.abs(_in_pieces(runtime, case)[real] - reference).max()))
    return _Comparison(float(np.max(errors)), np.concatenate(references))  # which, unlike max, lets no NaN through


def _in_pieces(runtime: Runtime, case: _Case) -> Array:
    decoding = runtime.start(*case.ids.shape)
    starts = np.cumsum((0, *case.pieces))[:-1]
    pieces = [slice(start, start + length) for start, length in zip(starts, case.pieces, strict=True)]
    return np.concatenate([decoding.feed(case.ids[:, at], case.mask[:, at]).copy() for at in pieces], axis=1)


def _greedy(model: nn.Module, runtime: Runtime, error: float, prompts: Array) -> dict[str, float]:
    """Let the graph write; wherever torch's choice after the same tokens is clear, it must be the graph's.

    One pass of torch over the finished text says what it would have chosen at each place. Nothing is chosen where the
    context has no room for a prompt and a new token, or the vocabulary has one token.
    """
    length = prompts.shape[1]
    if not length or model.config.vocab_size == 1:  # type: ignore[union-attr]
        return {"greedy_tokens": 0, "greedy_undecided": 0}
    text = runtime.generate(prompts, max_new_tokens=min(NEW_TOKENS, runtime.context - length), eos_token_id=-1)
    written, read = text[:, length:], text[:, :-1]
    reference = _torch_logits(model, read, np.ones_like(read))[:, length - 1 :]
    second, first = np.moveaxis(np.partition(reference, -2)[..., -2:], -1, 0)
    clear = first - second > 2 * error
    wrong = (clear & (reference.argmax(-1) != written)).any(axis=0)
    if wrong.any():
        raise ParityError(f"{MODEL_FILE}: greedy text differs from torch at new token {wrong.argmax() + 1}")
    return {"greedy_tokens": written.size, "greedy_undecided": int((~clear).sum())}


def _torch_logits(model: nn.Module, ids: Array, mask: Array) -> Array:
    positions = (mask.cumsum(-1) - 1).clip(min=0)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    with torch.no_grad():
        logits: Array = model(**{name: torch.from_numpy(value) for name, value in inputs.items()}).logits.numpy()
    return logits
