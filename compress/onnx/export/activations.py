"""Stock activation functions as ONNX nodes."""

from __future__ import annotations

import math
from collections.abc import Callable

from compress.errors import ModelError
from compress.onnx.export.graph import CONTRIB, Graph
from compress.registry import suggest

Activation = Callable[[Graph, str], str]


def _gelu(graph: Graph, x: str) -> str:
    return graph.node("Gelu", [x], domain=CONTRIB)


def _tanh_gelu(graph: Graph, x: str) -> str:
    return graph.node("FastGelu", [x], domain=CONTRIB)


def _sigmoid_gelu(alpha: float) -> Activation:
    return lambda graph, x: graph.node("QuickGelu", [x], domain=CONTRIB, alpha=alpha)


def _standard(op: str) -> Activation:
    return lambda graph, x: graph.node(op, [x])


def _clip(graph: Graph, x: str, low: float, high: float) -> str:
    return graph.node("Clip", [x, graph.scalar(low), graph.scalar(high)])


def _squared_relu(graph: Graph, x: str) -> str:
    positive = graph.node("Relu", [x])
    return graph.node("Mul", [positive, positive])


def _sqrt_softplus(graph: Graph, x: str) -> str:
    return graph.node("Sqrt", [graph.node("Softplus", [x])])


def _laplace(graph: Graph, x: str) -> str:
    """Normal distribution function with mean sqrt(1/2) and deviation sqrt(1/(4 pi)), rounded as in the stock class."""
    centred = graph.node("Sub", [x, graph.scalar(0.707107)])
    erf = graph.node("Erf", [graph.node("Div", [centred, graph.scalar(0.282095 * math.sqrt(2.0))])])
    return graph.node("Mul", [graph.node("Add", [erf, graph.scalar(1.0)]), graph.scalar(0.5)])


ACTIVATIONS: dict[str, Activation] = {
    "gelu": _gelu,
    "gelu_python": _gelu,
    "gelu_10": lambda graph, x: _clip(graph, _gelu(graph, x), -10.0, 10.0),
    "gelu_new": _tanh_gelu,
    "gelu_fast": _tanh_gelu,
    "gelu_accurate": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "gelu_python_tanh": _tanh_gelu,
    "quick_gelu": _sigmoid_gelu(1.702),
    "silu": _sigmoid_gelu(1.0),
    "swish": _sigmoid_gelu(1.0),
    "relu": _standard("Relu"),
    "relu2": _squared_relu,
    "relu6": lambda graph, x: _clip(graph, x, 0.0, 6.0),
    "leaky_relu": _standard("LeakyRelu"),
    "linear": lambda graph, x: x,
    "sigmoid": _standard("Sigmoid"),
    "tanh": _standard("Tanh"),
    "mish": _standard("Mish"),
    "hardswish": _standard("HardSwish"),
    "sqrtsoftplus": _sqrt_softplus,
    "laplace": _laplace,
}
"""Every stock activation function without weights, by its name in a stock config."""


def require_activation(name: str) -> None:
    """Raise ModelError for an activation function that cannot be exported."""
    if name not in ACTIVATIONS:
        raise ModelError(f"activation function {name!r} cannot be exported to ONNX. {suggest(name, ACTIVATIONS)}")


def activation(graph: Graph, name: str, x: str) -> str:
    """Add the activation function ``name``; ModelError for one that cannot be exported."""
    require_activation(name)
    return ACTIVATIONS[name](graph, x)
