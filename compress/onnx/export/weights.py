"""The weights of a graph, read from a torch model, float or packed, and the nodes that compute with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from compress.functional.packing import storage_bits
from compress.models.layout import (
    is_embedding,
    is_norm,
    is_product,
    is_rotary,
    norm_epsilon,
    norm_kind,
    rotary_tables,
    weight_of,
)
from compress.onnx.export.graph import Graph
from compress.onnx.export.matrices import JOIN, Array, FloatMatrix, Matrix, PackedMatrix, alike, fused
from compress.surgery.quantization import MatrixSpec, QuantizationSpec, Table


@dataclass(frozen=True)
class Norm:
    """What a normalization adds to the variance (or mean square), and whether it subtracts the mean."""

    epsilon: float
    centred: bool


@dataclass(frozen=True)
class Weights:
    """Matrices and normalizations by module, vectors (biases, weights of normalizations) by parameter.

    ``rotary`` holds the cosines and sines, each [context, head size / 2], of modules with rotary positions.
    """

    matrices: Mapping[str, Matrix]
    vectors: Mapping[str, Array]
    norms: Mapping[str, Norm]
    rotary: Mapping[str, tuple[Array, Array]]

    def product(self, graph: Graph, module: str | Sequence[str], x: str, output: str = "") -> str:
        """Multiply by a module's weight and add its bias, if any. Outputs of several modules are concatenated."""
        modules = (module,) if isinstance(module, str) else tuple(module)
        matrices = [self.matrices[each] for each in modules]
        if not alike(matrices):
            parts = [self.product(graph, each, x) for each in modules]
            return graph.node("Concat", parts, output, axis=-1)
        matrix = matrices[0] if len(matrices) == 1 else fused(matrices)
        return matrix.product(graph, JOIN.join(modules), x, self._bias(graph, modules), output)

    def products(self, graph: Graph, modules: Sequence[str], x: str) -> list[str]:
        """Return the output of each module for the same input, from one fused linear layer if one can compute all.

        Matrices that differ in bits, block size or inputs are multiplied one by one.
        """
        matrices = [self.matrices[each] for each in modules]
        if not alike(matrices):
            return [self.product(graph, each, x) for each in modules]
        outputs = [f"{module}.output" for module in modules]
        sizes = [matrix.outputs for matrix in matrices]
        return graph.split(self.product(graph, modules, x), sizes, outputs, name=f"{JOIN.join(modules)}.split")

    def _bias(self, graph: Graph, modules: Sequence[str]) -> str:
        names = [f"{module}.bias" for module in modules]
        if not any(name in self.vectors for name in names):
            return ""
        parts = [
            self.vectors.get(name, np.zeros(self.matrices[module].outputs, np.float32))
            for name, module in zip(names, modules, strict=True)
        ]
        return graph.weight(JOIN.join(names), np.concatenate(parts))

    def rows(self, graph: Graph, module: str, ids: str) -> str:
        """Look up rows of a module's weight."""
        return self.matrices[module].rows(graph, ids)

    def slice(self, graph: Graph, module: str, start: str, end: str) -> str:
        """Return the rows ``start`` to ``end`` of a module's float weight."""
        matrix = self.matrices[module]
        assert isinstance(matrix, FloatMatrix), f"{module} is packed"
        return graph.node("Slice", [graph.floats(matrix.name, matrix.values), start, end])

    def vector(self, graph: Graph, name: str) -> str:
        """Store a vector."""
        return graph.weight(name, self.vectors[name])


def read_weights(
    model: nn.Module,
    spec: QuantizationSpec | None = None,
    tensors: Mapping[str, Tensor] | None = None,
    *,
    split: bool = False,
) -> Weights:
    """Read the weights of a transformers model; codes, scales and float16 tables that ``spec`` names from ``tensors``.

    Modules that share one parameter share one stored weight. With ``split``, token embeddings are stored separately as
    dequantized float32 rows.
    """
    names: dict[int, str] = {}
    matrices: dict[str, Matrix] = {}
    norms: dict[str, Norm] = {}
    rotary: dict[str, tuple[Any, Any]] = {}
    vectors: dict[str, Any] = {}
    for name, module in model.named_modules():
        if is_product(module) or is_embedding(module):
            stored = names.setdefault(id(module.get_parameter("weight")), f"{name}.weight")
            values = module.weight if is_embedding(module) else weight_of(module)
            matrices[name] = FloatMatrix(stored, values.detach().cpu().numpy())
        elif is_norm(module):
            norms[name] = Norm(norm_epsilon(module), centred=norm_kind(module) == "layer")
        elif is_rotary(module):
            cosines, sines = rotary_tables(module)
            rotary[name] = cosines.numpy(), sines.numpy()
        for part, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 1:
                vectors[f"{name}.{part}"] = parameter.detach().cpu().numpy()
    for name, buffer in model.named_buffers():
        if buffer.ndim == 2 and len(buffer) == 1:  # the bias of the logits, stored as one row
            vectors[name] = buffer.detach().cpu().numpy()[0]
    if spec is not None and tensors is not None:
        matrices |= _quantized(model, spec, tensors, split=split)
    return Weights(matrices, vectors, norms, rotary)


def _quantized(
    model: nn.Module, spec: QuantizationSpec, tensors: Mapping[str, Tensor], *, split: bool
) -> Mapping[str, Matrix]:
    """Return the matrices that replace the model's own: float16 tables, codes, and separately stored rows."""
    halved = {name.removesuffix(".weight"): FloatMatrix(name, tensors[name].numpy()) for name in spec.half}
    coded = {matrix.module: _packed(matrix, tensors) for matrix in spec.matrices}
    apart = [matrix for matrix in spec.matrices if split and isinstance(model.get_submodule(matrix.module), Table)]
    return halved | coded | {matrix.module: _rows(matrix, model) for matrix in apart}


def _packed(matrix: MatrixSpec, tensors: Mapping[str, Tensor]) -> PackedMatrix:
    owner = matrix.shares or matrix.module
    codes, scales = (tensors[f"{owner}.{part}"].numpy() for part in ("codes", "scale"))
    bits, float_inputs = storage_bits(matrix.bits), matrix.activations == "none"
    return PackedMatrix(owner, codes, scales, bits, matrix.block, matrix.shape[1], float_inputs)


def _rows(matrix: MatrixSpec, model: nn.Module) -> FloatMatrix:
    weight = model.get_submodule(matrix.module).get_submodule("quantizer").get_parameter("weight")
    return FloatMatrix(f"{matrix.shares or matrix.module}.rows", weight.detach().cpu().numpy())
