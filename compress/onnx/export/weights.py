"""Weights of a graph, float or packed, and the nodes that multiply by them or look up their rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from onnx import helper

from compress.onnx.export.graph import CONTRIB, FLOAT, Graph
from compress.onnx.export.unpacking import unpacked

Array = np.ndarray[Any, Any]

FLOAT_KERNEL_BITS = 4
"""The only number of bits whose kernel takes float32 inputs; other codes would be unpacked again at every product."""


class Matrix(Protocol):
    """A weight [N, K]: N outputs (or tokens), K inputs (or channels)."""

    @property
    def name(self) -> str:
        """The name of the stored weight."""
        ...

    @property
    def outputs(self) -> int:
        """N."""
        ...

    @property
    def columns(self) -> int:
        """K."""
        ...

    def product(self, graph: Graph, module: str, x: str, bias: str, output: str = "") -> str:
        """Add nodes for x W^T + bias. The product is named ``module``; an empty ``bias`` means none."""
        ...

    def rows(self, graph: Graph, ids: str) -> str:
        """Add nodes that look up rows."""
        ...


def float_product(graph: Graph, module: str, x: str, weight: str, bias: str, output: str) -> str:
    """Add nodes for x W^T + bias in float32."""
    product = graph.node("FusedMatMul", [x, weight], "" if bias else output, name=module, domain=CONTRIB, transB=1)
    return graph.node("Add", [product, bias], output) if bias else product


@dataclass(frozen=True)
class FloatMatrix:
    """A weight [N, K] in float32, or in float16 with products in float32."""

    name: str
    values: Array

    @property
    def outputs(self) -> int:
        return int(self.values.shape[0])

    @property
    def columns(self) -> int:
        return int(self.values.shape[1])

    def product(self, graph: Graph, module: str, x: str, bias: str, output: str = "") -> str:
        return float_product(graph, module, x, graph.floats(self.name, self.values), bias, output)

    def rows(self, graph: Graph, ids: str) -> str:
        return graph.node("Gather", [graph.floats(self.name, self.values), ids])


@dataclass(frozen=True)
class PackedMatrix:
    """Codes [N, blocks, bytes per block] and scales: one ([]), one per row ([N]), or one per block ([N, blocks])."""

    name: str
    codes: Array
    scales: Array
    bits: int
    block: int
    columns: int
    float_inputs: bool = False
    """Products read float32 inputs; otherwise inputs are rounded to 8 bits with one scale per row and block."""

    @property
    def outputs(self) -> int:
        return int(self.codes.shape[0])

    def product(self, graph: Graph, module: str, x: str, bias: str, output: str = "") -> str:
        """One MatMulNBits on packed codes: ``accuracy_level`` is 4 for 8-bit inputs and 1 for float32 inputs.

        Codes without a kernel for float32 inputs are unpacked to a float weight when a session opens.
        """
        if self.float_inputs and self.bits != FLOAT_KERNEL_BITS:
            return float_product(graph, module, x, self._unpacked(graph), bias, output)
        inputs = [x, graph.weight(f"{self.name}.codes", self.codes), self._scales(graph)]
        return graph.node(
            "MatMulNBits",
            [*inputs, "", "", bias] if bias else inputs,
            output,
            name=module,
            domain=CONTRIB,
            bits=self.bits,
            block_size=self.block,
            K=self.columns,
            N=self.codes.shape[0],
            accuracy_level=1 if self.float_inputs else 4,
        )

    def rows(self, graph: Graph, ids: str) -> str:
        """One GatherBlockQuantized on the same bytes that a product reads; padding is removed."""
        codes = graph.weight(f"{self.name}.codes", self.codes)
        flat = graph.node("Reshape", [codes, graph.integers(self.codes.shape[0], -1)])
        gathered = graph.node(
            "GatherBlockQuantized",
            [flat, ids, self._scales(graph)],
            domain=CONTRIB,
            bits=self.bits,
            block_size=self.block,
            gather_axis=0,
            quantize_axis=1,
        )
        if self.columns == self.codes.shape[1] * self.block:
            return gathered
        bounds = [graph.integers(0), graph.integers(self.columns), graph.integers(-1)]
        return graph.node("Slice", [gathered, *bounds])

    def _unpacked(self, graph: Graph) -> str:
        codes = graph.weight(f"{self.name}.codes", self.codes)
        rows, blocks, size = self.codes.shape
        shape = rows, blocks, size
        return unpacked(graph, codes, self._scales(graph), shape=shape, bits=self.bits, columns=self.columns)

    def _scales(self, graph: Graph) -> str:
        """Scales [N, blocks] for the kernels, expanded from the stored ones when a session opens."""
        if self.scales.ndim == 2:
            return graph.floats(f"{self.name}.scales", self.scales)
        shape = graph.integers(*self.codes.shape[:2])
        if self.scales.ndim:
            column = graph.floats(f"{self.name}.scales", self.scales.reshape(-1, 1))
            return graph.node("Expand", [column, shape])
        value = helper.make_tensor("value", FLOAT, [1], [float(self.scales)])
        return graph.node("ConstantOfShape", [shape], value=value)


@dataclass(frozen=True)
class FusedMatrix(PackedMatrix):
    """Packed matrices with the same input, concatenated by rows; each part keeps its own scales."""

    parts: tuple[PackedMatrix, ...] = ()

    def _scales(self, graph: Graph) -> str:
        return graph.node("Concat", [part._scales(graph) for part in self.parts], axis=0)


JOIN = "+"
"""Separates the modules in the name of a fused product."""


def fused(matrices: Sequence[Matrix]) -> Matrix:
    """One matrix of several that multiply the same input; outputs are in the order of the matrices.

    Packed matrices must agree in bits, block size, columns and inputs, float matrices in columns.
    """
    name = JOIN.join(matrix.name for matrix in matrices)
    packed = [matrix for matrix in matrices if isinstance(matrix, PackedMatrix)]
    if not packed:
        floats = [matrix.values for matrix in matrices if isinstance(matrix, FloatMatrix)]
        return FloatMatrix(name, np.concatenate(floats))
    first = packed[0]
    return FusedMatrix(
        name=name,
        codes=np.concatenate([matrix.codes for matrix in packed]),
        scales=np.zeros(0),
        bits=first.bits,
        block=first.block,
        columns=first.columns,
        float_inputs=first.float_inputs,
        parts=tuple(packed),
    )


def _alike(matrices: Sequence[Matrix]) -> bool:
    """True if one product can compute all: float matrices, or packed ones with equal bits, block size and inputs."""

    def form(matrix: Matrix) -> tuple[object, ...]:
        if isinstance(matrix, PackedMatrix):
            return matrix.bits, matrix.block, matrix.columns, matrix.float_inputs
        return (matrix.columns,)

    return len({form(matrix) for matrix in matrices}) == 1


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
        if not _alike(matrices):
            parts = [self.product(graph, each, x) for each in modules]
            return graph.node("Concat", parts, output, axis=-1)
        matrix = matrices[0] if len(matrices) == 1 else fused(matrices)
        return matrix.product(graph, JOIN.join(modules), x, self._bias(graph, modules), output)

    def products(self, graph: Graph, modules: Sequence[str], x: str) -> list[str]:
        """The output of each module for the same input, from one fused product if one can compute all.

        Matrices that differ in bits, block size or inputs are multiplied one by one.
        """
        matrices = [self.matrices[each] for each in modules]
        if not _alike(matrices):
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
        """Rows ``start`` to ``end`` of a module's float weight."""
        matrix = self.matrices[module]
        assert isinstance(matrix, FloatMatrix), f"{module} is packed"
        return graph.node("Slice", [graph.floats(matrix.name, matrix.values), start, end])

    def vector(self, graph: Graph, name: str) -> str:
        """Store a vector."""
        return graph.weight(name, self.vectors[name])
