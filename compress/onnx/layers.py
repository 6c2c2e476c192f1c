"""Blocks of a transformer as fused nodes; each function adds one block and returns the names of its values."""

from __future__ import annotations

from dataclasses import dataclass

from compress.models.blocks import AttentionBlock, FeedForward
from compress.onnx.activations import activation
from compress.onnx.graph import CONTRIB, INT32, Graph
from compress.onnx.weights import Weights

MASKED = -1e9
"""Added to the scores of padding; exact in float32, as exp(score - 1e9) is 0."""
HEAD_SIZE_MULTIPLE = 8
"""GroupQueryAttention refuses a head size that this does not divide."""


@dataclass(frozen=True)
class Lengths:
    """What self-attention needs besides queries, keys and values.

    ``padding`` [B, 1, S, T] is added to the scores, ``last`` [B] is the index of the last position, ``total`` the
    number T of positions.
    """

    padding: str
    last: str
    total: str


def lengths(graph: Graph, ids: str, mask: str) -> Lengths:
    """Derive them from ``attention_mask`` [B, T], once a graph.

    Every row counts as T positions long, and what the mask hides gets a score of -1e9: padding may be on either side.
    """
    batch = graph.node("Shape", [ids], end=1)
    new = graph.node("Shape", [ids], start=1, end=2)
    length = graph.node("Cast", [graph.node("Shape", [mask], start=1, end=2)], to=INT32)
    total = graph.node("Squeeze", [length])
    last = graph.node("Expand", [graph.node("Sub", [length, graph.int32(1)]), batch])
    hidden = graph.node("Equal", [mask, graph.integers(0)])
    bias = graph.node("Where", [hidden, graph.scalar(MASKED), graph.scalar(0.0)])
    spread = graph.node("Concat", [graph.integers(1, 1), new, graph.integers(1)], axis=0)
    padding = graph.node("Expand", [graph.node("Unsqueeze", [bias, graph.integers(1, 2)]), spread])
    return Lengths(padding, last, total)


def skip_norm(graph: Graph, weights: Weights, norm: str, x: str, residual: str) -> tuple[str, str]:
    """Layer normalization of x + residual; returns it and the sum."""
    gamma, beta = (weights.vector(graph, f"{norm}.{part}") for part in ("weight", "bias"))
    outputs = [f"{norm}.output", "", "", f"{norm}.sum"]
    graph.nodes(
        "SkipLayerNormalization",
        [x, residual, gamma, beta],
        outputs,
        name=norm,
        domain=CONTRIB,
        epsilon=weights.epsilons[norm],
    )
    return outputs[0], outputs[3]


def self_attention(
    graph: Graph, weights: Weights, block: AttentionBlock, x: str, cache: tuple[list[str], list[str]], at: Lengths
) -> str:
    """Causal attention over a cache; ``cache`` names the past and the present key and value [B, heads, length, size].

    One GroupQueryAttention, which can append to the cache in place; for head sizes it refuses, a MultiHeadAttention,
    which copies the cache.
    """
    past, present = cache
    projected = [weights.product(graph, module, x) for module in block.qkv]
    if block.head_size % HEAD_SIZE_MULTIPLE == 0:
        inputs = [*projected, *[""] * (3 - len(projected)), *past, at.last, at.total, "", "", "", at.padding]
        attended = f"{block.out}.input"
        graph.nodes(
            "GroupQueryAttention",
            inputs,
            [attended, *present],
            name=attended,
            domain=CONTRIB,
            num_heads=block.heads,
            kv_num_heads=block.heads,
            scale=block.scale,
        )
        return weights.product(graph, block.out, attended)
    return weights.product(graph, block.out, _copying_attention(graph, block, projected, past, present, at))


def _copying_attention(
    graph: Graph, block: AttentionBlock, projected: list[str], past: list[str], present: list[str], at: Lengths
) -> str:
    if len(projected) == 1:
        parts = [f"{block.out}.{part}" for part in ("query", "key", "value")]
        projected = graph.nodes("Split", projected, parts, name=f"{block.out}.split", axis=-1, num_outputs=3)
    attended = f"{block.out}.input"
    graph.nodes(
        "MultiHeadAttention",
        [*projected, "", "", at.padding, *past],
        [attended, *present],
        name=attended,
        domain=CONTRIB,
        num_heads=block.heads,
        unidirectional=1,
        scale=block.scale,
    )
    return attended


def feed_forward(graph: Graph, weights: Weights, block: FeedForward, x: str) -> str:
    """Product, activation function, product."""
    return weights.product(graph, block.down, activation(graph, block.activation, weights.product(graph, block.up, x)))
