"""Unpack weights to float32 with standard nodes on constants; onnxruntime runs them once, when a session opens."""

from __future__ import annotations

import numpy as np

from compress.onnx.export.graph import FLOAT, Graph


def unpacked(graph: Graph, codes: str, scales: str, *, shape: tuple[int, int, int], bits: int, columns: int) -> str:
    """codes * scales, [N, K] float32, equal to torch's dequantized weights in every bit.

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
