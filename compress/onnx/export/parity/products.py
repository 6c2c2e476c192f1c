"""Compare each packed linear layer of a written graph, alone, with its torch module.

The reference multiplies the module's own quantized inputs and weights in float64, so the difference is the kernel's
rounding alone. A kernel with 8-bit inputs keeps codes unsigned: it sums x (code + zero point), subtracts the zero point
times the sum of x, and rounds both. For a large input whose weights are all zero, only that rounding error is left, and
it is large beside a small product. So the outlier is put on a channel with large weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
import torch.nn.functional as F
from onnx import helper
from torch import nn

from compress.errors import ParityError
from compress.functional.fake_quant import levels
from compress.onnx.export.graph import FLOAT
from compress.onnx.export.matrices import JOIN
from compress.surgery.quantization import MatrixSpec, Product, Table

Array = np.ndarray[Any, Any]

ROWS = 4
OUTLIER = 50.0
"""The size of the outlier channel, as a multiple of every other channel."""


def product_errors(
    graphs: Mapping[str, onnx.ModelProto], model: nn.Module, matrices: Sequence[MatrixSpec]
) -> Iterator[tuple[str, float]]:
    """Yield the module and max |y - y_ref| / max |y_ref| of every packed layer, for inputs with an outlier channel.

    A matrix of zeros has max |y_ref| = max |bias|. Its error is relative to the product of its largest code and the
    outlier, if that is larger than max |y_ref|. If both are zero, any error is infinite.

    Raises:
        ParityError: the graphs, named by their files, have no packed linear layer for one of the matrices, or one that
            belongs to no matrix. The other tests of the gate would not bound the rounding of its 8-bit inputs.
    """
    generator = np.random.default_rng(0)
    places = {module: place for file, graph in graphs.items() for module, place in _places(file, graph, matrices)}
    for matrix in matrices:
        module = model.get_submodule(matrix.module)
        if isinstance(module, Table):
            continue
        if matrix.module not in places:
            raise ParityError(f"the graph has no packed linear layer for {matrix.module}")
        graph, node, outputs = places[matrix.module]
        assert isinstance(module, Product)
        weight = module.quantizer().detach().numpy()
        x = product_inputs(matrix.shape[1], matrix.block, generator, large_channels(weight))
        expected = _reference(module, x)
        found, scales = _run_alone(graph, node, x)
        measure = np.abs(expected).max()
        if not weight.any():
            measure = max(measure, scales[outputs].max() * levels(matrix.bits) * np.abs(x).max())
        error = np.abs(found[:, outputs] - expected).max()
        yield matrix.module, float(error / measure) if measure else (0.0 if error == 0 else math.inf)


@torch.no_grad()
def _reference(product: Product, x: Array) -> Array:
    """Return the output of a module for x: inputs and weights are rounded as in the module, the rest is in float64."""
    bias = None if product.bias is None else product.bias.double()
    taken = product.activations(torch.from_numpy(x))
    y: Array = F.linear(taken.double(), product.quantizer().double(), bias).numpy()
    return y


def _places(
    file: str, graph: onnx.ModelProto, matrices: Sequence[MatrixSpec]
) -> Iterator[tuple[str, tuple[onnx.ModelProto, onnx.NodeProto, slice]]]:
    """Yield the node that computes each module, and the slice of its outputs that belongs to the module."""
    rows = {matrix.module: matrix.shape[0] for matrix in matrices}
    stored = {tensor.name for tensor in graph.graph.initializer}
    for node in graph.graph.node:
        unpacked = node.op_type == "FusedMatMul" and node.input[1] not in stored
        if node.op_type == "MatMulNBits" or unpacked:
            start = 0
            for module in node.name.split(JOIN):
                if module not in rows:
                    raise ParityError(f"{file}: has a packed linear layer that the torch model does not have: {module}")
                yield module, (graph, node, slice(start, start + rows[module]))
                start += rows[module]


def large_channels(weight: Array) -> Array:
    """Return channels of a weight [N, K] whose largest entry is at least half of the largest entry of all."""
    sizes = np.abs(weight).max(0)
    return np.flatnonzero(~(sizes < sizes.max() / 2))  # with NaN all channels; the product then shows the NaN


def product_inputs(columns: int, block: int, generator: np.random.Generator, channels: Array | None = None) -> Array:
    """Return inputs [rows, K] float32 whose 8-bit codes do not depend on the last bit of the arithmetic.

    In each block one channel has code 127, and the others are at least 0.2 away from a tie between two codes. One
    channel, the outlier, is 50 times larger than all others: the others in its block have codes from -2 to 2. The
    outlier is drawn from ``channels``, or from all channels.
    """
    blocks = -(-columns // block)
    codes = generator.integers(-127, 128, (ROWS, blocks * block)).astype(np.float64)
    outlier = int(generator.choice(columns if channels is None else channels))
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


def _run_alone(graph: onnx.ModelProto, node: onnx.NodeProto, x: Array) -> tuple[Array, Array]:
    """Run one node of a graph on x, with the constants it reads and the separate node that adds its bias.

    Returns its output, and the scales of each output's codes: 0 for a node with unpacked weights.
    """
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
    names = [nodes[-1].output[0], *([node.input[2]] if node.op_type == "MatMulNBits" else [])]
    outputs = [helper.make_tensor_value_info(name, FLOAT, None) for name in names]
    alone = helper.make_model(
        helper.make_graph(nodes, "product", inputs, outputs, stored),
        opset_imports=graph.opset_import,
        ir_version=graph.ir_version,
    )
    session = ort.InferenceSession(alone.SerializeToString(), providers=["CPUExecutionProvider"])
    result, *scales = session.run(None, {node.input[0]: x})
    return result, scales[0] if scales else np.zeros((result.shape[1], 1))
