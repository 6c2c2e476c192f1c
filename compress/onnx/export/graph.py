"""A small builder of ONNX graphs. Each method adds one element and returns the name of its value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import set_external_data

OPSET = 21
CONTRIB = "com.microsoft"
"""The domain of the operators that onnxruntime adds to the ONNX standard."""
IR_VERSION = 10
EXTERNAL_OVER = 2**31 - 2**20
"""Weights of more bytes than this go to a second file: a protobuf message holds less than 2 GB."""
SHARED_OVER = 4096
"""Equal weights of two graphs are stored once if they have at least this many bytes."""
ALIGNMENT = 64
"""Offsets in a file of weights are multiples of this number of bytes."""

BOOL = TensorProto.BOOL
FLOAT = TensorProto.FLOAT
INT32 = TensorProto.INT32
INT64 = TensorProto.INT64

Dimension = int | str


class Graph:
    """Nodes, weights, inputs and outputs in the order in which they were added.

    A weight is stored once under its name: adding a name again returns the stored weight.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._nodes: list[onnx.NodeProto] = []
        self._weights: dict[str, np.ndarray[Any, Any]] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []

    def input(self, name: str, dtype: int, shape: Sequence[Dimension]) -> str:
        """Declare a graph input."""
        self._inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def option(self, name: str, *values: int) -> str:
        """Declare an optional int64 input with this default; sessions do not list it among their inputs."""
        self.weight(name, np.array(values, dtype=np.int64))
        return self.input(name, INT64, [len(values)])

    def output(self, name: str, dtype: int, shape: Sequence[Dimension]) -> None:
        """Declare a graph output, which a node must write."""
        self._outputs.append(helper.make_tensor_value_info(name, dtype, shape))

    def weight(self, name: str, value: np.ndarray[Any, Any]) -> str:
        """Store a weight, or return the weight already stored under this name."""
        self._weights.setdefault(name, np.ascontiguousarray(value))
        return name

    def floats(self, name: str, value: np.ndarray[Any, Any]) -> str:
        """Store a weight as `weight` does. A float16 weight is cast to float32 once, when a session opens."""
        new = name not in self._weights
        stored = self.weight(name, value)
        if value.dtype == np.float32:
            return stored
        return self.node("Cast", [stored], f"{name}.float32", to=FLOAT) if new else f"{name}.float32"

    def integers(self, *values: int) -> str:
        """Add a constant vector of int64, such as a shape."""
        return self.weight("shape_" + "_".join(map(str, values)), np.array(values, dtype=np.int64))

    def int32(self, value: int) -> str:
        """Add a constant int32 vector with one element."""
        return self.weight(f"int32_{value}", np.array([value], dtype=np.int32))

    def number(self, value: int) -> str:
        """Add a constant int64 scalar."""
        return self.weight(f"number_{value}", np.array(value, dtype=np.int64))

    def scalar(self, value: float) -> str:
        """Add a constant float32 scalar."""
        return self.weight(f"scalar_{value}", np.array(value, dtype=np.float32))

    def node(
        self, op: str, inputs: Sequence[str], output: str = "", *, name: str = "", domain: str = "", **attributes: Any
    ) -> str:
        """Add a node with one output."""
        output = output or f"{op}_{len(self._nodes)}"
        return self.nodes(op, inputs, [output], name=name or output, domain=domain, **attributes)[0]

    def nodes(
        self, op: str, inputs: Sequence[str], outputs: Sequence[str], *, name: str, domain: str = "", **attributes: Any
    ) -> list[str]:
        """Add a node with several outputs; an empty name omits an optional input or output."""
        self._nodes.append(helper.make_node(op, inputs, outputs, name=name, domain=domain, **attributes))
        return list(outputs)

    def split(self, value: str, sizes: Sequence[int], outputs: Sequence[str], *, name: str) -> list[str]:
        """Split the last dimension into parts of these sizes."""
        if len(set(sizes)) == 1:
            return self.nodes("Split", [value], outputs, name=name, axis=-1, num_outputs=len(sizes))
        return self.nodes("Split", [value, self.integers(*sizes)], outputs, name=name, axis=-1)

    def either(
        self, condition: str, op: str, then: Sequence[str], otherwise: Sequence[str], output: str, **attributes: Any
    ) -> str:
        """Add a node with one output. It reads the inputs ``then`` if ``condition`` is true, else ``otherwise``."""
        branches = {}
        for name, inputs in (("then_branch", then), ("else_branch", otherwise)):
            value = f"{output}.{name}"
            node = helper.make_node(op, inputs, [value], name=value, **attributes)
            described = helper.make_tensor_value_info(value, FLOAT, None)
            branches[name] = helper.make_graph([node], value, [], [described])
        return self.node("If", [condition], output, **branches)

    def model(self) -> onnx.ModelProto:
        """Return the finished model, without doc strings and metadata."""
        weights = [numpy_helper.from_array(value, name) for name, value in self._weights.items()]
        graph = helper.make_graph(self._nodes, self._name, self._inputs, self._outputs, weights)
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="compress-lm")


def strip(model: onnx.ModelProto) -> None:
    """Remove doc strings, metadata and intermediate shapes in place: an exporter writes local paths into them."""
    del model.metadata_props[:]
    model.ClearField("doc_string")
    _strip_graph(model.graph)
    for function in model.functions:
        del function.metadata_props[:]
        del function.value_info[:]
        function.ClearField("doc_string")
        for node in function.node:
            _strip_node(node)


def _strip_graph(graph: onnx.GraphProto) -> None:
    del graph.metadata_props[:]
    del graph.value_info[:]
    graph.ClearField("doc_string")
    for value in (*graph.input, *graph.output, *graph.initializer):
        del value.metadata_props[:]
        value.ClearField("doc_string")
    for node in graph.node:
        _strip_node(node)


def _strip_node(node: onnx.NodeProto) -> None:
    del node.metadata_props[:]
    node.ClearField("doc_string")
    for attribute in node.attribute:
        attribute.ClearField("doc_string")
        if attribute.HasField("g"):
            _strip_graph(attribute.g)


def _weight_bytes(model: onnx.ModelProto) -> int:
    """Return the bytes of the stored weights. protobuf cannot report the size of a message above 2 GB."""
    return sum(
        math.prod(tensor.dims) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        for tensor in model.graph.initializer
    )


def save(model: onnx.ModelProto, path: Path, *, external_over: int = EXTERNAL_OVER) -> None:
    """Write ``path``, and also ``path`` + ``_data`` if the weights take more than ``external_over`` bytes."""
    strip(model)
    if _weight_bytes(model) <= external_over:
        onnx.save_model(model, path)
        return
    data = path.with_name(path.name + "_data")
    data.unlink(missing_ok=True)
    onnx.save_model(model, path, save_as_external_data=True, all_tensors_to_one_file=True, location=data.name)


def save_pair(
    first: onnx.ModelProto, second: onnx.ModelProto, paths: tuple[Path, Path], shared: Path, **options: Any
) -> None:
    """Write two graphs. Large weights that both hold, if any, go once into the file ``shared`` beside them.

    ``options`` are those of :func:`save`.
    """
    stored = {tensor.name: tensor for tensor in first.graph.initializer}
    written = bytearray()
    for tensor in second.graph.initializer:
        twin = stored.get(tensor.name)
        if twin is not None and len(tensor.raw_data) >= SHARED_OVER and twin.raw_data == tensor.raw_data:
            data = tensor.raw_data
            for each in (twin, tensor):
                set_external_data(each, shared.name, offset=len(written), length=len(data))
                each.ClearField("raw_data")
            written += data + bytes(-len(data) % ALIGNMENT)
    shared.unlink(missing_ok=True)
    if written:
        shared.write_bytes(written)
    for graph, path in zip((first, second), paths, strict=True):
        save(graph, path, **options)
