"""Export to ONNX: a directory that onnxruntime opens, checked against the torch model before it is sealed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Literal

import torch
from safetensors.torch import load_file

from compress.artifact import QUANTIZED, Artifact
from compress.errors import ModelError
from compress.models.description import activation_name, require_described
from compress.models.loading import build
from compress.models.stock_files import copy_settings
from compress.models.structure import stock_tensors
from compress.onnx.export.activations import require_activation
from compress.onnx.export.exporter import Packed, export
from compress.schema import added
from compress.stages.stage import Context, Result, Shape, Stage
from compress.surgery.coverage import Coverage, owners
from compress.surgery.quantization import ActivationName, QuantizationSpec


class ExportOnnx(Stage):
    """Write ``model.onnx`` with a key/value cache, or an encoder and its decoder, float or packed as the source is.

    ``graph: decoding`` is built from onnxruntime's fused operators; ``plain`` is what torch's exporter makes of the
    stock model, float only. A packed graph takes the inputs of products as the source does: in 8 bits per block, as the
    fast kernels do, or as they are (weight-only). No kernel takes them as ``scheme: paper`` does. What ``replace`` and
    ``float`` make is not what was trained, so its quality has to be measured again on the exported artifact.
    """

    type: Literal["export_onnx"] = "export_onnx"
    graph: Literal["decoding", "plain"] = "decoding"
    activations: Literal["exact", "replace", "float"] = "exact"
    """Inputs of packed products: as the source takes them; in 8 bits per block instead; or in float32 instead."""
    head: Literal["tied", "split"] = added("tied")
    """Of a packed model: the token embedding reads the head's codes, or has rows of its own in float32."""

    forbids: ClassVar[frozenset[str]] = frozenset({"masked", "onnx", "bitsandbytes"})
    gives: ClassVar[frozenset[str]] = frozenset({"onnx"})

    def run(self, source: Artifact, out: Path, context: Context) -> Result:
        spec = source.manifest.quantization
        packed = None
        if spec is not None:
            if self.activations != "exact":
                spec = _with_inputs(source, spec, "block" if self.activations == "replace" else "none")
            packed = Packed(spec, load_file(source.path / QUANTIZED), split=self.head == "split")
        model = source.model(quantization=spec)
        copy_settings(source.path, out)
        _write_tokenizer_file(source, out)
        parity = export(model, out, packed=packed, graph=self.graph, seed=context.seed)
        (out / "details.json").write_text(json.dumps({"parity": parity, "tables": source.family().embeddings}))
        with torch.device("meta"):  # the quantizer of a product is not counted as a module
            modules = len(owners(build(source.config())))
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
            traits=self.traits_after(source.traits),
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
        if source.scheme == "paper" and self.activations == "exact":
            yield (
                "activations: exact is impossible, the kernel quantizes them per block and this model otherwise; "
                "allowed: replace, float, or scheme block in quantize"
            )
        if self.activations == "replace" and source.scheme in (None, "block"):
            yield f"activations: replace has nothing to replace; allowed: exact{', float' if quantized else ''}"
        if self.activations == "float" and source.scheme in (None, "none"):
            yield "activations: float changes nothing, inputs of products are float32 already; allowed: exact"
        if self.head == "split" and not quantized:
            yield "head: split needs packed codes to keep apart, and this model has none; allowed: tied"
        elif self.head == "split" and not source.config.tie_word_embeddings:
            yield "head: split has nothing to split, head and embedding of this model are not tied; allowed: tied"


def _write_tokenizer_file(source: Artifact, out: Path) -> None:
    """Write ``tokenizer.json`` for a source that has its older parts alone: deployment reads nothing else."""
    file = out / "tokenizer.json"
    if not file.exists() and (tokenizer := source.tokenizer()) is not None:
        tokenizer.backend_tokenizer.save(str(file))


def _with_inputs(source: Artifact, spec: QuantizationSpec, activations: ActivationName) -> QuantizationSpec:
    """The same codes, with another quantization of the inputs of products."""
    tables = source.family().embeddings
    taken = {"activations": activations, "clip": None}
    matrices = tuple(each if each.module in tables else each.model_copy(update=taken) for each in spec.matrices)
    return spec.model_copy(update={"matrices": matrices})


def _notes(source: Artifact, spec: QuantizationSpec | None) -> Iterator[str]:
    if not source.stock_shape():
        yield "opens in compress.onnx.runtime only: a shape without stock class"
    if spec is not None and spec.note:
        yield spec.note


def _bytes(directory: Path, pattern: str) -> int:
    return sum(file.stat().st_size for file in directory.glob(pattern))
