"""The gate of an export: does the written graph compute what the torch model computes?

The gate compares logits on whole sequences and through the cache: with left padding, with single tokens, and with
several tokens on a past. Then it compares greedy text. A quantized graph must pass three tests:

1. Each packed linear layer alone, with 8-bit inputs, is within 1e-5 (:mod:`compress.onnx.export.parity.products`).
2. The whole graph with float32 inputs of linear layers is within the limit of float graphs.
3. The whole graph as written. Float32 sums in another order can change the rounding of an 8-bit input by one step,
   which changes the inputs of all later layers. Two correct evaluations therefore differ by as much as quantizing the
   inputs does. The limit is 1e-3 of the logits' range, or three times the effect of quantizing the inputs if that is
   larger.

For linear layers with float32 inputs, tests 2 and 3 are the same.

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
from torch import nn

from compress.errors import ParityError
from compress.onnx.export.graph import save
from compress.onnx.export.parity.cases import Case, cases_of, graph_logits, torch_logits
from compress.onnx.export.parity.products import product_errors
from compress.onnx.runtime import Runtime
from compress.onnx.runtime.session import Array
from compress.surgery.quantization import Product, QuantizationSpec

FLOAT_LIMIT, PACKED_LIMIT = 1e-4, 1e-3
"""The largest logit error allowed, as a fraction of the range of the reference logits."""
ROUNDING_LIMIT = 3.0
"""The largest logit error of a packed graph, as a multiple of the effect of quantizing the inputs of linear layers."""
PRODUCT_LIMIT = 1e-5
NEW_TOKENS = 16
"""The number of tokens of greedy text."""


@dataclass(frozen=True)
class _Comparison:
    """The largest error over positions that are not padding, and torch's logits there, [positions, V]."""

    error: float
    reference: Array

    @property
    def spread(self) -> float:
        """The range of the reference logits; with a vocabulary of one token, the range includes zero."""
        return float(np.ptp(self.reference if self.reference.shape[-1] > 1 else np.append(self.reference, 0)))


def check_parity(
    model: nn.Module, directory: Path, spec: QuantizationSpec | None = None, *, seed: int = 0
) -> dict[str, float]:
    """Compare the graphs in a directory with the deployed torch model that they were made from.

    Returns:
        ``max_logit_error``, its ``limit``, ``logit_range``, ``positions`` compared, ``greedy_tokens`` compared and
        ``greedy_undecided`` (tokens whose two best logits lie within twice the error, where text may differ); for a
        quantized model also ``products`` and ``max_product_error`` (relative), and where their inputs are
        quantized ``max_float_logit_error`` (with inputs in float32) and its ``float_limit``.

    Raises:
        ParityError: an error exceeds its limit; the message has both numbers.
    """
    runtime = Runtime.open(directory)
    generator = np.random.default_rng(seed)
    vocabulary: int = model.config.vocab_size  # type: ignore[union-attr, assignment]
    cases = list(cases_of(vocabulary, runtime.context, generator, with_sources=runtime.reads_sources))
    compared = _compare(model, runtime, cases)
    limit = FLOAT_LIMIT * compared.spread
    prompts = generator.integers(0, vocabulary, (2, min(8, runtime.context // 2)))
    figures: dict[str, float] = {}
    if spec is not None:
        figures = _products(model, runtime, directory, spec)
    if spec is not None and spec.activations != "none":
        with float_activations(model), _float_twin(directory) as twin:
            floats = _compare(model, twin, cases)
            float_limit = FLOAT_LIMIT * floats.spread
            _require(runtime, "logits with float inputs of linear layers differ", floats.error, float_limit)
            _greedy(model, twin, floats.error, float_limit, prompts)  # the small error leaves almost no token undecided
        figures |= {"max_float_logit_error": floats.error, "float_limit": float_limit}
        effect = float(np.abs(compared.reference - floats.reference).max())
        limit = max(PACKED_LIMIT * compared.spread, ROUNDING_LIMIT * effect)
    _require(runtime, "logits differ", compared.error, limit)
    figures |= {"max_logit_error": compared.error, "limit": limit, "logit_range": compared.spread}
    greedy = _greedy(model, runtime, compared.error, limit, prompts)
    return figures | {"positions": len(compared.reference)} | greedy


def _require(runtime: Runtime, what: str, error: float, limit: float) -> None:
    if not error <= limit:
        raise ParityError(f"{runtime.files}: {what} from torch by {error:.3g}, limit {limit:.3g}")


def _products(model: nn.Module, runtime: Runtime, directory: Path, spec: QuantizationSpec) -> dict[str, float]:
    errors = dict(product_errors(_graphs(directory), model, spec.matrices))
    for module, error in errors.items():
        _require(runtime, f"{module} differs relatively", error, PRODUCT_LIMIT)
    return {"products": len(errors), "max_product_error": max(errors.values())}


@contextmanager
def float_activations(model: nn.Module) -> Iterator[None]:
    """Let the packed linear layers of a torch model read float32 inputs inside this context."""
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
    """The same graphs and weights, with linear layers on float32 inputs (``accuracy_level`` 1)."""
    with TemporaryDirectory() as temporary:
        for settings in directory.glob("*config.json"):
            shutil.copyfile(settings, Path(temporary) / settings.name)
        for name, graph in _graphs(directory).items():
            for node in graph.graph.node:
                for attribute in node.attribute:
                    if attribute.name == "accuracy_level":
                        attribute.i = 1
            save(graph, Path(temporary) / name)
        yield Runtime.open(temporary)


def _graphs(directory: Path) -> dict[str, onnx.ModelProto]:
    return {path.name: onnx.load(path) for path in sorted(directory.glob("*.onnx"))}


def _compare(model: nn.Module, runtime: Runtime, cases: Iterable[Case]) -> _Comparison:
    errors, references = [], []
    for case in cases:
        real = case.mask == 1
        reference = torch_logits(model, case)[real]
        references.append(reference)
        errors.append(float(np.abs(graph_logits(runtime, case)[real] - reference).max()))
    return _Comparison(float(np.max(errors)), np.concatenate(references))  # unlike max, this propagates NaN


def _greedy(model: nn.Module, runtime: Runtime, error: float, limit: float, prompts: Array) -> dict[str, float]:
    """Generate greedy text with the graph. Where torch's choice after the same tokens is clear, both must agree.

    One forward pass of torch over the finished text gives its choice at each position. A choice is clear if the two
    largest logits differ by more than twice the largest error. That error includes the error along this text, which
    must also be within the limit: this text may meet a rounding step that no earlier case met. Nothing is generated if
    the context has no room for a prompt and a new token, or if the vocabulary has one token.
    """
    prompted = prompts.shape[1]
    if not prompted or model.config.vocab_size == 1:  # type: ignore[union-attr]
        return {"greedy_tokens": 0, "greedy_undecided": 0}
    free: dict[str, Any] = dict.fromkeys(("eos_token_id", "forced_bos_token_id", "forced_eos_token_id"), -1)
    text = runtime.generate(prompts, max_new_tokens=min(NEW_TOKENS, runtime.context - prompted), **free)
    source = prompts if runtime.reads_sources else None
    length = 1 if runtime.reads_sources else prompted
    written, read = text[:, length:], text[:, :-1]
    whole = None if source is None else np.ones_like(source)
    pieces = (length, *(1,) * (read.shape[1] - length))
    case = Case(read, np.ones_like(read), pieces, source, whole)
    reference, seen = (found[:, length - 1 :] for found in (torch_logits(model, case), graph_logits(runtime, case)))
    along = float(np.abs(seen - reference).max())
    _require(runtime, "logits of greedy text differ", along, limit)
    second, first = np.moveaxis(np.partition(reference, -2)[..., -2:], -1, 0)
    clear = first - second > 2 * max(error, along)
    wrong = (clear & (reference.argmax(-1) != written)).any(axis=0)
    if wrong.any():
        raise ParityError(f"{runtime.files}: greedy text differs from torch at new token {wrong.argmax() + 1}")
    return {"greedy_tokens": written.size, "greedy_undecided": int((~clear).sum())}
