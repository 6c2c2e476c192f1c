"""Export to ONNX: a directory that onnxruntime opens, checked against the torch model before it is sealed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Literal

from safetensors.torch import load_file

from compress.artifact import QUANTIZED, Artifact
from compress.errors import ModelError
from compress.models.blocks import activation_name, require_described
from compress.models.settings import copy_settings
from compress.models.structure import stock_tensors
from compress.onnx.activations import require_activation
from compress.onnx.export import Packed, export
from compress.stages.stage import Context, Result, Shape, Stage
from compress.surgery.coverage import Coverage, owners
from compress.surgery.quantize import QuantizationSpec


class ExportOnnx(Stage):
    """Write ``model.onnx`` with a key/value cache, or an encoder and its decoder, float or packed as the source is.

    ``graph: decoding`` is built from onnxruntime's fused operators; ``plain`` is what torch's exporter makes of the
    stock model, float only. A packed graph quantizes the inputs of products per block, as its kernel does. A source
    that was trained with another scheme, or with none, needs ``activations: replace``, and its quality has to be
    measured again on the exported artifact.
    """

    type: Literal["export_onnx"] = "export_onnx"
    graph: Literal["decoding", "plain"] = "decoding"
    activations: Literal["exact", "replace"] = "exact"

    forbids: ClassVar[frozenset[str]] = frozenset({"masked", "onnx", "bitsandbytes"})
    gives: ClassVar[frozenset[str]] = frozenset({"onnx"})

    def run(self, source: Artifact, out: Path, context: Context) -> Result:
        spec = source.manifest.quantization
        packed = None
        if spec is not None:
            spec = _deployed(source, spec) if self.activations == "replace" else spec
            source = replace(source, manifest=source.manifest.model_copy(update={"quantization": spec}))
            packed = Packed(spec, load_file(source.path / QUANTIZED))
        model = source.model()
        copy_settings(source.path, out)
        _write_tokenizer_file(source, out)
        parity = export(model, out, packed=packed, graph=self.graph, seed=context.seed)
        (out / "details.json").write_text(json.dumps({"parity": parity}))
        modules = len(owners(model))
        numbers = sum(tensor.numel() for tensor in stock_tensors(model))
        coverage = Coverage(
            modules_touched=modules,
            modules_total=modules,
            parameters_touched=numbers,
            parameters_total=numbers,
            bytes_before=_bytes(source.path, "*.safetensors"),
            bytes_after=_bytes(out, "*.onnx*"),
            note="; ".join(_notes(source, spec)),
        )
        metrics = {name: float(parity[name]) for name in ("max_logit_error", "limit")}
        return Result(
            traits=source.traits | self.gives,
            coverage=coverage,
            kept=source.manifest.kept,
            quantization=spec,
            metrics=metrics,
        )

    def problems(self, source: Shape, teacher: Shape | None) -> Iterator[str]:
        try:
            require_described(source.config)
            require_activation(activation_name(source.config))
        except ModelError as error:
            yield str(error)
        quantized = "quantized" in source.traits
        if self.graph == "plain" and source.config.is_encoder_decoder:
            yield "graph: plain is traced from decoders alone; an encoder and its decoder take decoding"
        if self.graph == "plain" and quantized:
            yield "graph: plain holds float weights only; a quantized model takes decoding"
        if quantized and not source.deployable and self.activations == "exact":
            yield (
                "activations: exact is impossible, the kernel quantizes them per block and this model otherwise; "
                "allowed: replace, or scheme block in quantize"
            )
        if self.activations == "replace" and (source.deployable or not quantized):
            yield "activations: replace has nothing to replace; allowed: exact"


def _write_tokenizer_file(source: Artifact, out: Path) -> None:
    """Write ``tokenizer.json`` for a source that has its older parts alone: deployment reads nothing else."""
    file = out / "tokenizer.json"
    if not file.exists() and (tokenizer := source.tokenizer()) is not None:
        tokenizer.backend_tokenizer.save(str(file))


def _deployed(source: Artifact, spec: QuantizationSpec) -> QuantizationSpec:
    """The same codes with the activations of the deployed kernel."""
    tables = source.family().embeddings
    block = {"activations": "block", "clip": None}
    matrices = tuple(each if each.module in tables else each.model_copy(update=block) for each in spec.matrices)
    return spec.model_copy(update={"matrices": matrices})


def _notes(source: Artifact, spec: QuantizationSpec | None) -> Iterator[str]:
    if not source.stock_shape():
        yield "opens in compress.onnx.runtime only: a shape without stock class"
    if spec is not None and spec.note:
        yield spec.note


def _bytes(directory: Path, pattern: str) -> int:
    return sum(file.stat().st_size for file in directory.glob(pattern))
