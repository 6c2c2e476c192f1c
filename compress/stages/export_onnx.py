"""Export to ONNX: a directory that onnxruntime opens, checked against the torch model before it is sealed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Literal

import torch
from safetensors.torch import load_file

from compress.artifact import QUANTIZED, Artifact
from compress.engine.graph_checks import graph_problems
from compress.models.loading import build
from compress.models.stock_files import copy_settings
from compress.models.structure import stock_tensors
from compress.onnx.export.exporter import Packed, export
from compress.problem import Problem
from compress.schema import added
from compress.stages.stage import Context, Result, Shape, Stage
from compress.surgery.coverage import Coverage, owners
from compress.surgery.quantization import ActivationName, QuantizationSpec


class ExportOnnx(Stage):
    """Write ``model.onnx`` with a key/value cache, or an encoder and a decoder. The weights are float or packed, like
    those of the source.

    ``graph: decoding`` is built from onnxruntime's fused operators. ``plain`` is the output of torch's exporter for the
    transformers model, and is float only. A packed graph treats the inputs of linear layers as the source does. It
    quantizes them in 8 bits per block, as the fast kernels do, or leaves them in float (weight-only). No kernel
    quantizes them as ``granularity: tensor`` does. With ``replace`` or ``float`` the exported model differs from the
    trained one, so measure its quality again on the exported artifact.
    """

    type: Literal["export_onnx"] = "export_onnx"
    graph: Literal["decoding", "plain"] = "decoding"
    activations: Literal["exact", "replace", "float"] = "exact"
    """Inputs of packed linear layers: as in the source (exact), in 8 bits per block (replace), or float32 (float)."""
    head: Literal["tied", "split"] = added("tied")
    """In a packed model the token embedding reads the head's codes (tied) or its own float32 rows (split)."""

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
        with torch.device("meta"):  # without quantizers, which would count as modules
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

    def problems(self, source: Shape, teacher: Shape | None) -> Iterator[Problem]:
        quantized = "quantized" in source.traits
        yield from graph_problems(source.config, self.graph, self.head, quantized=quantized)
        yield from self._input_problems(source, quantized)

    def _input_problems(self, source: Shape, quantized: bool) -> Iterator[Problem]:
        if source.activations == "tensor" and self.activations == "exact":
            yield Problem(
                ("activations",),
                "exact is impossible, because the kernel quantizes per block and this model per tensor; "
                "allowed: replace, float, or granularity: block in the activations of quantize",
            )
        if self.activations == "replace" and source.activations in (None, "block"):
            text = f"replace has nothing to replace; allowed: exact{', float' if quantized else ''}"
            yield Problem(("activations",), text)
        if self.activations == "float" and source.activations in (None, "none"):
            text = "float changes nothing, because inputs of linear layers are float32 already; allowed: exact"
            yield Problem(("activations",), text)


def _write_tokenizer_file(source: Artifact, out: Path) -> None:
    """Write ``tokenizer.json`` if the source has only the older tokenizer files, which deployment does not read."""
    file = out / "tokenizer.json"
    if not file.exists() and (tokenizer := source.tokenizer()) is not None:
        tokenizer.backend_tokenizer.save(str(file))


def _with_inputs(source: Artifact, spec: QuantizationSpec, activations: ActivationName) -> QuantizationSpec:
    """Return the same specification, with another quantization of the inputs of linear layers."""
    tables = source.family().embeddings
    taken = {"activations": activations, "clip": None}
    matrices = tuple(each if each.module in tables else each.model_copy(update=taken) for each in spec.matrices)
    return spec.model_copy(update={"matrices": matrices})


def _notes(source: Artifact, spec: QuantizationSpec | None) -> Iterator[str]:
    if not source.stock_shape():
        yield "opens only in compress.onnx.runtime, because no transformers class has this shape"
    if spec is not None and spec.note:
        yield spec.note


def _bytes(directory: Path, pattern: str) -> int:
    return sum(file.stat().st_size for file in directory.glob(pattern))
