"""One weight of a graph, float or packed, and the nodes that multiply by it or look up its rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from onnx import helper

from compress.onnx.export.graph import CONTRIB, FLOAT, Graph

Array = np.ndarray[Any, Any]

FLOAT_KERNEL_BITS = 4
"""The only number of bits whose kernel takes float32 inputs; other codes would be unpacked at every product."""


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
        """Add nodes for x W^T + bias. The product's node is named ``module``; an empty ``bias`` means none."""
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
    """A weight [N, K] in float32, or stored in float16 and multiplied in float32."""

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
    """Whether inputs are read in float32; otherwise they are rounded to 8 bits with one scale per row and block."""

    @property
    def outputs(self) -> int:
        return int(self.codes.shape[0])

    def product(self, graph: Graph, module: str, x: str, bias: str, output: str = "") -> str:
        """Add one MatMulNBits on packed codes: ``accuracy_level`` is 4 for 8-bit inputs and 1 for float32 inputs.

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
        """Add one GatherBlockQuantized on the same bytes that a linear layer reads; padding is removed."""
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
"""Separates the modules in the name of a fused linear layer."""


def fused(matrices: Sequence[Matrix]) -> Matrix:
    """Join several matrices that multiply the same input; outputs are in the order of the matrices.

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


def alike(matrices: Sequence[Matrix]) -> bool:
    """Say if one matrix product can compute all: float matrices, or packed with equal bits, block and inputs."""

    def form(matrix: Matrix) -> tuple[object, ...]:
        if isinstance(matrix, PackedMatrix):
            return matrix.bits, matrix.block, matrix.columns, matrix.float_inputs
        return (matrix.columns,)

    return len({form(matrix) for matrix in matrices}) == 1


def unpacked(graph: Graph, codes: str, scales: str, *, shape: tuple[int, int, int], bits: int, columns: int) -> str:
    """Add nodes for codes * scales, [N, K] float32, equal to torch's dequantized weights in every bit.

    The nodes are standard ones on constants. onnxruntime runs them once, when a session opens.

    Args:
        graph: receives the nodes.
        codes: unsigned codes in uint8, the first code in the lowest bits of a byte.
        scales: float32 [N, blocks].
        shape: of ``codes``: [N, blocks, bytes per block].
        bits: of a code; the code 2^(bits - 1) stands for 0.
        columns: K; padding in the last block is removed.
    """
    rows, blocks, size = shape
    if bits < 8:
        shifts = graph.weight(f"shifts_{bits}", np.arange(0, 8, bits, dtype=np.uint8))
        mask = graph.weight(f"mask_{bits}", np.array(2**bits - 1, dtype=np.uint8))
        spread = graph.node("Unsqueeze", [codes, graph.integers(-1)])
        codes = graph.node("BitwiseAnd", [graph.node("BitShift", [spread, shifts], direction="RIGHT"), mask])
        codes = graph.node("Reshape", [codes, graph.integers(rows, blocks, size * 8 // bits)])
    signed = graph.node("Sub", [graph.node("Cast", [codes], to=FLOAT), graph.scalar(2.0 ** (bits - 1))])
    values = graph.node("Mul", [signed, graph.node("Unsqueeze", [scales, graph.integers(-1)])])
    values = graph.node("Reshape", [values, graph.integers(rows, -1)])
    if columns == blocks * size * 8 // bits:
        return values
    return graph.node("Slice", [values, graph.integers(0), graph.integers(columns), graph.integers(-1)])
