"""The bytes of weights that a graph reads per decoded token: a lower bound on what any runtime fetches."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import onnx
from onnx import helper

from compress.onnx.names import DECODER_FILE, ENCODER_FILE, MODEL_FILE

TOKEN_INPUTS = frozenset({"input_ids", "position_ids"})
"""The graph inputs that change with each token."""
_LOOKUPS = ("Gather", "GatherBlockQuantized", "Slice")
"""Operators whose first input may be a table, of which a step with one token reads one row."""
_ROTATION = "RotaryEmbedding"
"""Operator whose constants are tables of cosines and sines, of which it reads one row too."""
_NO_WEIGHTS = (onnx.TensorProto.INT64, onnx.TensorProto.INT32, onnx.TensorProto.BOOL)
"""Types of shapes, lengths and switches."""


def directory_step_bytes(directory: Path) -> int:
    """:func:`step_bytes` of the graph in an exported directory that decodes; its weights are not loaded."""
    name = DECODER_FILE if (directory / ENCODER_FILE).exists() else MODEL_FILE
    return step_bytes(onnx.load(directory / name, load_external_data=False))


def step_bytes(model: onnx.ModelProto) -> int:
    """Sum the weights, as they are stored, that a step with one new token reads.

    Weights of linear layers, their scales and vectors count once each. A table counts as one row, its first index: a
    constant that ``Gather``, ``GatherBlockQuantized`` or ``Slice`` reads, or the cosines and sines of
    ``RotaryEmbedding``. Work that does not depend on the new token, such as the projection of an encoder's states, is
    done once per text and does not count. Caches do not count either.
    """
    stored = {tensor.name: _Weight.of(tensor) for tensor in model.graph.initializer}
    constants = {name: {name} for name in stored}
    changing = set(TOKEN_INPUTS)
    read: dict[str, int] = {}
    rows: dict[str, int] = {}
    for node in model.graph.node:
        inputs = list(_inputs(node))
        if all(name in constants for name in inputs):
            value = next((field.t for field in node.attribute if field.name == "value"), None)
            own = {node.output[0]} if value is not None else set()
            if value is not None:
                stored[node.output[0]] = _Weight.of(value)
            constants |= dict.fromkeys(node.output, own.union(*(constants[name] for name in inputs)))
        elif not changing.isdisjoint(inputs):
            changing.update(node.output)
            table = node.op_type == _ROTATION or (node.op_type in _LOOKUPS and inputs[0] in constants)
            for weight in set().union(*(constants[name] for name in inputs if name in constants)):
                into, size = (rows, stored[weight].row) if table else (read, stored[weight].bytes)
                into[weight] = size
    return sum(read.values()) + sum(rows.values())


class _Weight:
    """The bytes of a stored tensor and of its first row; 0 for shapes."""

    def __init__(self, size: int, rows: int) -> None:
        self.bytes, self.row = size, size // max(1, rows)

    @classmethod
    def of(cls, tensor: onnx.TensorProto) -> _Weight:
        if tensor.data_type in _NO_WEIGHTS:
            return cls(0, 1)
        size = math.prod(tensor.dims) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        return cls(size, tensor.dims[0] if tensor.dims else 1)


def _inputs(node: onnx.NodeProto) -> Iterator[str]:
    """Yield the inputs of a node and of its branches. Names inside a branch are harmless."""
    yield from filter(None, node.input)
    for attribute in node.attribute:
        if attribute.HasField("g"):
            for inner in attribute.g.node:
                yield from _inputs(inner)
