"""Tiny exported models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import onnx
import pytest
from torch import nn

from compress.models import family_of
from compress.models.loading import build
from compress.onnx.export.exporter import Packed, export
from compress.surgery.quantization import (
    ActivationQuantization,
    EmbeddingQuantization,
    Quantization,
    Storage,
    WeightQuantization,
    packed_state,
    quantize,
    restore,
)


@dataclass(frozen=True)
class Exported:
    """A directory with its graph, and the torch model it must equal."""

    directory: Path
    model: Any
    figures: dict[str, float]
    packed: Packed | None = None

    @property
    def graph(self) -> onnx.ModelProto:
        return onnx.load(self.directory / "model.onnx")


FLOAT32, FLOAT16 = Storage(), Storage(scales="float16", positions="float16")


def packed_model(
    model: Any,
    bits: int,
    *,
    embedding: int | None = None,
    rows: Any = "row",
    store: Storage = FLOAT32,
    float_inputs: bool = False,
    **weights: Any,
) -> tuple[nn.Module, Packed]:
    """The deployed form of a quantized model, and its packed tensors; ``rows`` is the embedding's granularity."""
    family = family_of(model.config)
    config = Quantization(
        weights=WeightQuantization(bits=bits, **weights),  # type: ignore[arg-type]
        embedding=EmbeddingQuantization(bits=embedding or bits, granularity=rows),  # type: ignore[arg-type]
        activations=None if float_inputs else ActivationQuantization(),
        store=store,
    )
    quantize(model, family, config)
    tensors, spec = packed_state(model, store)
    deployed = build(model.config)
    restore(deployed, family, spec, tensors, dequantize=False)
    return deployed.eval(), Packed(spec, tensors)


@pytest.fixture
def exported(tmp_path: Path, request: pytest.FixtureRequest) -> Callable[..., Exported]:
    """A function that exports a random model: bits (0: float), family, options of ``packed_model`` and of the family.

    ``family`` is one of the ``tiny_`` fixtures.
    """

    def make(
        bits: int = 0,
        *,
        embedding: int | None = None,
        split: bool = False,
        model: Any = None,
        family: str = "gpt2",
        graph: Any = "decoding",
        quantization: Mapping[str, Any] = MappingProxyType({}),
        **options: Any,
    ) -> Exported:
        model = model or request.getfixturevalue(f"tiny_{family}")(**options)
        packed = None
        if bits:
            model, packed = packed_model(model, bits, embedding=embedding, **quantization)
            packed = replace(packed, split=split)
        out = tmp_path / "exported"
        out.mkdir()
        model.config.save_pretrained(out)
        return Exported(out, model, export(model, out, packed=packed, graph=graph), packed)

    return make
