"""Embeddings, normalizations, activation functions and feed-forward blocks as nodes, and the chain of a stack."""

from __future__ import annotations

import math
from collections.abc import Callable

from compress.errors import ModelError
from compress.models.description import Block, FeedForward, Stack
from compress.onnx.export.graph import CONTRIB, Graph
from compress.onnx.export.weights import Weights
from compress.registry import suggest

Activation = Callable[[Graph, str], str]


def tokens(graph: Graph, weights: Weights, stack: Stack, ids: str) -> str:
    """Add the token embeddings [B, S, D]."""
    rows = weights.rows(graph, stack.tokens, ids)
    return rows if stack.token_scale == 1 else graph.node("Mul", [rows, graph.scalar(stack.token_scale)])


def embeddings(graph: Graph, weights: Weights, stack: Stack, ids: str, positions: str) -> tuple[str, str]:
    """Add the two terms of the embeddings: learned positions of ``positions`` [B, S] ("" for none), and tokens."""
    added = ""
    if stack.positions:
        offset = stack.position_offset
        rows = graph.node("Add", [positions, graph.integers(offset)]) if offset else positions
        added = weights.rows(graph, stack.positions, rows)
    return added, tokens(graph, weights, stack, ids)


def counted_embeddings(graph: Graph, weights: Weights, stack: Stack, ids: str, past: str = "") -> tuple[str, str]:
    """Do as :func:`embeddings` does for tokens [B, S] without padding after ``past`` (one-element vector) others."""
    rows = tokens(graph, weights, stack, ids)
    if not stack.positions:
        return "", rows
    start = graph.integers(stack.position_offset)
    if past:
        start = graph.node("Add", [past, start])
    end = graph.node("Add", [start, graph.node("Shape", [ids], start=1, end=2)])
    return rows, weights.slice(graph, stack.positions, start, end)


def norm(graph: Graph, weights: Weights, name: str, x: str, added: str = "") -> tuple[str, str]:
    """Add the normalization of added + x, or of x alone; return it and the sum.

    Layer normalization is (x - mean) / sqrt(variance + epsilon) * weight + bias. Root-mean-square normalization is
    x / sqrt(mean of squares + epsilon) * weight (Zhang and Sennrich 2019, arXiv 1910.07467).
    """
    kind = weights.norms[name]
    parts = [f"{name}.{part}" for part in ("weight", "bias") if f"{name}.{part}" in weights.vectors]
    vectors = [weights.vector(graph, part) for part in parts]
    simplified = "" if kind.centred else "Simplified"
    if not added:
        op = f"{simplified}LayerNormalization"
        return graph.node(op, [x, *vectors], f"{name}.output", name=name, axis=-1, epsilon=kind.epsilon), x
    outputs = [f"{name}.output", "", "", f"{name}.sum"]
    graph.nodes(
        f"Skip{simplified}LayerNormalization",
        [added, x, *vectors],
        outputs,
        name=name,
        domain=CONTRIB,
        epsilon=kind.epsilon,
    )
    return outputs[0], outputs[3]


def chain(
    graph: Graph, weights: Weights, stack: Stack, start: tuple[str, str], output: Callable[[Block, str], str]
) -> str:
    """Add the blocks and the last normalization, [B, S, D].

    ``start`` holds the first term that is added to the residual stream ("" for none), and the stream. ``output`` adds
    the nodes of a block that reads the named value, and returns the next term.
    """
    added, residual = start
    if stack.embedding_norm:
        added, residual = "", norm(graph, weights, stack.embedding_norm, residual, added)[0]
    for block in stack.blocks:
        normed, total = norm(graph, weights, block.norm, residual, added)
        residual = total if stack.pre_norm else normed
        added = output(block, normed)
    return norm(graph, weights, stack.norm, residual, added)[0]


def feed_forward(graph: Graph, weights: Weights, block: FeedForward, x: str) -> str:
    """Add nodes for down(activation(up(x))), or down(activation(gate(x)) * up(x)) where the block has a gate."""
    if not block.gate:
        inner = activation(graph, block.activation, weights.product(graph, block.up, x))
        return weights.product(graph, block.down, inner)
    gate, up = weights.products(graph, (block.gate, block.up), x)
    inner = graph.node("Mul", [activation(graph, block.activation, gate), up])
    return weights.product(graph, block.down, inner)


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
    """Add the normal distribution function, mean sqrt(1/2), deviation sqrt(1/(4 pi)), rounded as in transformers."""
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
"""Every transformers activation function without weights, by its name in a config."""


def require_activation(name: str) -> None:
    """Raise ModelError for an activation function that cannot be exported."""
    if name not in ACTIVATIONS:
        raise ModelError(f"activation function {name!r} cannot be exported to ONNX. {suggest(name, ACTIVATIONS)}")


def activation(graph: Graph, name: str, x: str) -> str:
    """Add the activation function ``name``; ModelError for one that cannot be exported."""
    require_activation(name)
    return ACTIVATIONS[name](graph, x)
