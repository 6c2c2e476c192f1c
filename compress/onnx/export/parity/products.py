"""Each packed product of a written graph, alone, against the torch module that it stands for.

The reference multiplies the module's own quantized inputs and weights in float64: the kernel's rounding alone is left.
A kernel of 8-bit inputs keeps codes unsigned: it sums x (code + zero point), takes sum x times the zero point off, and
rounds both. Of a large input that meets weights of zero alone this is all that it leaves, and much beside a small
product; so the outlier is put on a channel with large weights.
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
from compress.onnx.export.weights import JOIN
from compress.surgery.quantization import MatrixSpec, Product, Table

Array = np.ndarray[Any, Any]

ROWS = 4
OUTLIER = 50.0
"""How many times larger than every other channel the injected one is."""


def product_errors(
    graphs: Mapping[str, onnx.ModelProto], model: nn.Module, matrices: Sequence[MatrixSpec]
) -> Iterator[tuple[str, float]]:
    """The module and max |y - y_ref| / max |y_ref| of every packed product, for inputs with an outlier channel.

    A matrix of zeros has no weight to measure by: there the error is in parts of what its largest code would make of
    the outlier, if that is more than max |y_ref|. If that is zero too, so must y be: any error is infinite.

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
    """What a module makes of x, its inputs and weights rounded as they are and all else in float64."""
    bias = None if product.bias is None else product.bias.double()
    taken = product.activations(torch.from_numpy(x))
    y: Array = F.linear(taken.double(), product.quantizer().double(), bias).numpy()
    return y


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


def large_channels(weight: Array) -> Array:
    """Channels of [N, K] whose largest weight is at least half of the largest of all."""
    sizes = np.abs(weight).max(0)
    return np.flatnonzero(~(sizes < sizes.max() / 2))  # all, if there is a NaN, which the product will show


def product_inputs(columns: int, block: int, generator: np.random.Generator, channels: Array | None = None) -> Array:
    """Inputs [rows, K] float32 whose 8-bit codes do not depend on the last bit of the arithmetic.

    In each block one channel takes code 127 and the others stay 0.2 away from a tie between two codes. One channel,
    the outlier, is 50 times larger than all others: in its block they take codes of -2 to 2. It is drawn from
    ``channels``, or from all.
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
    """Run one node of a graph, with the constants it reads and the bias that a node of its own adds, on x.

    Returns its output, and the scales of each output's codes: 0 where it multiplies by weights that are unpacked.
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
