"""Each packed product of a written graph, alone, against the torch module that it stands for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import helper
from torch import nn

from compress.errors import ParityError
from compress.onnx.graph import FLOAT
from compress.onnx.weights import JOIN
from compress.surgery.quantize import MatrixSpec, Table

ROWS = 4
OUTLIER = 50.0
"""How many times larger than every other channel the injected one is."""


def product_errors(
    graphs: Mapping[str, onnx.ModelProto], model: nn.Module, matrices: Sequence[MatrixSpec]
) -> Iterator[tuple[str, float]]:
    """The module and max |y - y_torch| / max |y_torch| of every packed product, for inputs with an outlier channel.

    Raises:
        ParityError: the graphs, named by their files, hold no packed product for one of the matrices, or one for none
            of them: 8-bit inputs that no other test of the gate would hold to more than their rounding.
    """
    generator = np.random.default_rng(0)
    places = {module: place for file, graph in graphs.items() for module, place in _places(file, graph, matrices)}
    for matrix in matrices:
        module = model.get_submodule(matrix.module)
        if isinstance(module, Table):
            continue
        if matrix.module not in places:
            raise ParityError(f"the graph holds no packed product for {matrix.module}")
        graph, node, outputs = places[matrix.module]
        x = product_inputs(matrix.shape[1], matrix.block, generator)
        with torch.no_grad():
            expected = module(torch.from_numpy(x)).numpy()
        error = np.abs(_run_alone(graph, node, x)[:, outputs] - expected).max()
        yield matrix.module, float(error / np.abs(expected).max())


def _places(
    file: str, graph: onnx.ModelProto, matrices: Sequence[MatrixSpec]
) -> Iterator[tuple[str, tuple[onnx.ModelProto, onnx.NodeProto, slice]]]:
    """Where a graph computes a module's product: the node, and which of its outputs are the module's."""
    rows = {matrix.module: matrix.shape[0] for matrix in matrices}
    stored = {tensor.name for tensor in graph.graph.initializer}
    for node in graph.graph.node:
        unpacked = node.op_type == "FusedMatMul" and node.input[1] not in stored
        if node.op_type == "MatMulNBits" or unpacked:
            start = 0
            for module in node.name.split(JOIN):
                if module not in rows:
                    raise ParityError(f"{file}: holds a packed product that torch has not: {module}")
                yield module, (graph, node, slice(start, start + rows[module]))
                start += rows[module]


def product_inputs(columns: int, block: int, generator: np.random.Generator) -> np.ndarray[Any, Any]:
    """Inputs [rows, K] float32 whose 8-bit codes do not depend on the last bit of the arithmetic.

    In each block one channel takes code 127 and the others stay 0.2 away from a tie between two codes. One channel,
    the outlier, is 50 times larger than all others: in its block they take codes of -2 to 2.
    """
    blocks = -(-columns // block)
    codes = generator.integers(-127, 128, (ROWS, blocks * block)).astype(np.float64)
    outlier = int(generator.integers(columns))
    inside = slice(outlier // block * block, (outlier // block + 1) * block)
    codes[:, inside] = generator.integers(-2, 3, (ROWS, block))
    codes += generator.uniform(-0.3, 0.3, codes.shape)
    codes = codes.clip(-126.7, 126.7)
    codes[:, ::block] = 127
    codes[:, inside.start] = codes[:, inside.start + 1]
    codes[:, outlier] = 127
    scales = generator.uniform(0.5, 1.0, (ROWS, blocks)) / 127
    scales[:, outlier // block] = OUTLIER / 127
    return (codes * scales.repeat(block, axis=1))[:, :columns].astype(np.float32)


def _run_alone(graph: onnx.ModelProto, node: onnx.NodeProto, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Run one node of a graph, with the constants it reads and the bias that a node of its own adds, on x."""
    biases = JOIN.join(f"{module}.bias" for module in node.name.split(JOIN))
    behind = [each for each in graph.graph.node if list(each.input) == [node.output[0], biases]]
    weights = {tensor.name: tensor for tensor in graph.graph.initializer}
    producers = {output: each for each in graph.graph.node for output in each.output if output}
    nodes, stored, pending = [node, *behind], [], [*node.input[1:], *(each.input[1] for each in behind)]
    while pending:
        name = pending.pop()
        if name in weights:
            stored.append(weights.pop(name))
        elif name in producers:
            nodes.insert(0, producers[name])
            pending.extend(producers.pop(name).input)
    inputs = [helper.make_tensor_value_info(node.input[0], FLOAT, x.shape)]
    outputs = [helper.make_tensor_value_info(nodes[-1].output[0], FLOAT, None)]
    alone = helper.make_model(
        helper.make_graph(nodes, "product", inputs, outputs, stored),
        opset_imports=graph.opset_import,
        ir_version=graph.ir_version,
    )
    session = ort.InferenceSession(alone.SerializeToString(), providers=["CPUExecutionProvider"])
    result: np.ndarray[Any, Any] = session.run(None, {node.input[0]: x})[0]
    return result
