"""Blocks of a transformer as fused nodes; each function adds one block and returns the names of its values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from compress.errors import ModelError
from compress.models.description import AttentionBlock, Block, CrossAttention, FeedForward, Stack
from compress.onnx.export.activations import activation
from compress.onnx.export.graph import BOOL, CONTRIB, INT32, Graph
from compress.onnx.export.weights import Weights

MASKED = -1e9
"""Added to the scores of padding; exact in float32, as exp(score - 1e9) is 0."""
TO_THE_END = 2**63 - 1
HEAD_SIZE_MULTIPLE = 8
"""GroupQueryAttention refuses a head size that this does not divide."""
ROTARY_MULTIPLE = 16
"""GroupQueryAttention rotates heads whose size this divides; others are rotated by nodes of their own."""


@dataclass(frozen=True)
class Lengths:
    """What self-attention needs besides queries, keys and values.

    ``padding`` [B, 1, S, T] is added to the scores, ``last`` [B] is the index of the last position, ``total`` the
    number T of positions. ``rotary`` names the tables [positions, head size / 2] of cosines and sines (empty where
    positions are learned). A token is rotated by its place in the cache, padding included: scores depend on distances
    alone, and these are the same. ``start`` [1] is the place of the first new token; only rotary positions need it.
    """

    padding: str
    last: str
    total: str
    rotary: tuple[str, ...] = ()
    start: str = ""


def tokens(graph: Graph, weights: Weights, stack: Stack, ids: str) -> str:
    """Token embeddings [B, S, D]."""
    rows = weights.rows(graph, stack.tokens, ids)
    return rows if stack.token_scale == 1 else graph.node("Mul", [rows, graph.scalar(stack.token_scale)])


def counted_positions(graph: Graph, weights: Weights, stack: Stack, ids: str, past: str = "") -> str:
    """Position embeddings [S, D] of tokens [B, S] that follow ``past`` (a vector of one number) others."""
    start = graph.integers(stack.position_offset)
    if past:
        start = graph.node("Add", [past, start])
    end = graph.node("Add", [start, graph.node("Shape", [ids], start=1, end=2)])
    return weights.slice(graph, stack.positions, start, end)


def counted_lengths(graph: Graph, ids: str, past: str) -> Lengths:
    """Lengths of rows without padding: ``past`` (a vector of one number) positions and those of ``ids`` [B, S]."""
    total = graph.node("Add", [past, graph.node("Shape", [ids], start=1, end=2)])
    return _lengths(graph, ids, graph.node("Cast", [total], to=INT32), padding="")


def lengths(graph: Graph, ids: str, mask: str) -> Lengths:
    """Derive them from ``attention_mask`` [B, T], once a graph.

    Every row counts as T positions long, and what the mask hides gets a score of -1e9: padding may be on either side.
    """
    new = graph.node("Shape", [ids], start=1, end=2)
    length = graph.node("Cast", [graph.node("Shape", [mask], start=1, end=2)], to=INT32)
    hidden = graph.node("Equal", [mask, graph.integers(0)])
    bias = graph.node("Where", [hidden, graph.scalar(MASKED), graph.scalar(0.0)])
    spread = graph.node("Concat", [graph.integers(1, 1), new, graph.integers(1)], axis=0)
    padding = graph.node("Expand", [graph.node("Unsqueeze", [bias, graph.integers(1, 2)]), spread])
    return _lengths(graph, ids, length, padding)


def _lengths(graph: Graph, ids: str, length: str, padding: str) -> Lengths:
    last = graph.node("Sub", [length, graph.int32(1)])
    rows = graph.node("Expand", [last, graph.node("Shape", [ids], end=1)])
    return Lengths(padding, rows, graph.node("Squeeze", [length]))


def skip_norm(graph: Graph, weights: Weights, norm: str, x: str, residual: str) -> tuple[str, str]:
    """Normalization of x + residual (of x alone where the residual is empty); returns it and the sum."""
    kind, outputs = weights.norms[norm], [f"{norm}.output", "", "", f"{norm}.sum"]
    parts = ("weight", "bias") if kind.kind == "layer" else ("weight",)
    gains = [weights.vector(graph, f"{norm}.{part}") for part in parts]
    if not residual:
        alone = "LayerNormalization" if kind.kind == "layer" else "SimplifiedLayerNormalization"
        return graph.node(alone, [x, *gains], outputs[0], name=norm, axis=-1, epsilon=kind.epsilon), x
    graph.nodes(
        "SkipLayerNormalization" if kind.kind == "layer" else "SkipSimplifiedLayerNormalization",
        [x, residual, *gains],
        outputs,
        name=norm,
        domain=CONTRIB,
        epsilon=kind.epsilon,
    )
    return outputs[0], outputs[3]


def chain(
    graph: Graph, weights: Weights, stack: Stack, start: tuple[str, str], output: Callable[[Block, str], str]
) -> str:
    """The blocks and the last normalization, [B, S, D].

    ``start`` is what is added to the residual stream first, and the stream (empty: the former alone); ``output`` adds a
    block that reads the named value and returns what is added next.
    """
    added, residual = start
    if stack.embedding_norm:
        added, residual = skip_norm(graph, weights, stack.embedding_norm, added, residual)[0], ""
    for block in stack.blocks:
        normed, total = skip_norm(graph, weights, block.norm, added, residual)
        residual = total if stack.pre_norm else normed
        added = output(block, normed)
    return skip_norm(graph, weights, stack.norm, added, residual)[0]


def self_attention(
    graph: Graph, weights: Weights, block: AttentionBlock, x: str, cache: tuple[list[str], list[str]], at: Lengths
) -> str:
    """Causal attention over a cache; ``cache`` names the past and the present key and value [B, heads, length, size].

    One GroupQueryAttention, which can append to the cache in place; for head sizes it refuses, a MultiHeadAttention,
    which copies the cache.
    """
    past, present = cache
    projected = weights.product(graph, block.qkv, x)
    attended = f"{block.out}.input"
    if block.head_size % HEAD_SIZE_MULTIPLE:
        attended = _copying_attention(graph, block, projected, past, present, at)
        return weights.product(graph, block.out, attended)
    inside = bool(at.rotary) and block.head_size % ROTARY_MULTIPLE == 0
    tables = [*at.rotary] if inside else ["", ""]
    qkv = _rotated(graph, block, projected, at) if at.rotary and not inside else [projected, "", ""]
    inputs = [*qkv, *past, at.last, at.total]
    inputs += [*tables, "", at.padding] if at.padding or inside else []
    graph.nodes(
        "GroupQueryAttention",
        inputs,
        [attended, *present],
        name=attended,
        domain=CONTRIB,
        num_heads=block.heads,
        kv_num_heads=block.kv_heads,
        scale=block.scale,
        **({"do_rotary": 1} if inside else {}),
    )
    return weights.product(graph, block.out, attended)


def _rotated(graph: Graph, block: AttentionBlock, projected: str, at: Lengths) -> list[str]:
    """Query, key and value [B, S, heads x size]; the first two rotated by nodes of their own."""
    parts = [f"{block.out}.{part}" for part in ("query", "key", "value")]
    widths = (block.heads, block.kv_heads, block.kv_heads)
    sizes = graph.integers(*(heads * block.head_size for heads in widths))
    query, key, value = graph.nodes("Split", [projected, sizes], parts, name=f"{block.out}.split", axis=-1)
    turned = [
        graph.node("RotaryEmbedding", [part, at.start, *at.rotary], f"{part}.rotated", domain=CONTRIB, num_heads=heads)
        for part, heads in ((query, block.heads), (key, block.kv_heads))
    ]
    return [*turned, value]


def _copying_attention(
    graph: Graph, block: AttentionBlock, projected: str, past: list[str], present: list[str], at: Lengths
) -> str:
    if block.kv_heads != block.heads:
        raise ModelError(
            f"{block.out}: query heads that share keys and values have no kernel with a head size of "
            f"{block.head_size}; allowed: multiples of {HEAD_SIZE_MULTIPLE}"
        )
    attended = f"{block.out}.input"
    qkv = _rotated(graph, block, projected, at) if at.rotary else _parts(graph, block, projected)
    graph.nodes(
        "MultiHeadAttention",
        [*qkv, "", "", at.padding, *past],
        [attended, *present],
        name=attended,
        domain=CONTRIB,
        num_heads=block.heads,
        unidirectional=1,
        scale=block.scale,
    )
    return attended


def _parts(graph: Graph, block: AttentionBlock, projected: str) -> list[str]:
    parts = [f"{block.out}.{part}" for part in ("query", "key", "value")]
    return graph.nodes("Split", [projected], parts, name=f"{block.out}.split", axis=-1, num_outputs=3)


def encoder_attention(graph: Graph, weights: Weights, block: AttentionBlock, x: str, mask: str) -> str:
    """Attention of every position to every position that ``mask`` [B, S] int32 leaves."""
    parts = _parts(graph, block, weights.product(graph, block.qkv, x))
    attended = graph.node("MultiHeadAttention", [*parts, "", mask], f"{block.out}.input", **_masked(block))
    return weights.product(graph, block.out, attended)


@dataclass(frozen=True)
class Source:
    """What cross-attention reads besides queries and its cache.

    ``states`` [B, U, E] are the encoder's states whose keys and values the cache does not hold: all while it is empty,
    none afterwards. ``cached`` is true afterwards, ``mask`` [B, R] int32 is 0 at padding.
    """

    states: str
    cached: str
    mask: str


def source(graph: Graph, states: str, mask: str, past: str) -> Source:
    """Derive it from all states [B, R, E], their mask [B, R], and a cache [B, heads, R or 0, head size]."""
    read = graph.node("Shape", [past], start=2, end=3)
    return Source(
        states=graph.node("Slice", [states, read, graph.integers(TO_THE_END), graph.integers(1)]),
        cached=graph.node("Cast", [graph.node("Squeeze", [read])], to=BOOL),
        mask=graph.node("Cast", [mask], to=INT32),
    )


def cross_attention(
    graph: Graph, weights: Weights, block: CrossAttention, x: str, at: Source, cache: tuple[list[str], list[str]]
) -> str:
    """Attention of a decoder to the states of an encoder; ``cache`` names the past and the present key and value.

    The present is what this step projected. Attention reads it, or the past where that holds something: the cache is
    never copied. The projections, which would not be prepacked inside a branch, take no rows once the past is there.
    """
    past, present = cache
    query = weights.product(graph, block.query, x)
    projected = weights.product(graph, (block.key, block.value), at.states)
    heads = graph.node("Reshape", [projected, graph.integers(0, 0, 2 * block.heads, block.head_size)])
    turned = graph.node("Transpose", [heads], perm=[0, 2, 1, 3])
    graph.nodes("Split", [turned], present, name=f"{block.out}.split", axis=1, num_outputs=2)
    attended = graph.either(
        at.cached,
        "MultiHeadAttention",
        [query, *past, "", at.mask],
        [query, *present, "", at.mask],
        f"{block.out}.input",
        **_masked(block),
    )
    return weights.product(graph, block.out, attended)


def _masked(block: AttentionBlock | CrossAttention) -> dict[str, Any]:
    """Attributes of a MultiHeadAttention whose mask adds -1e9 to the scores of padding."""
    return {"domain": CONTRIB, "num_heads": block.heads, "scale": block.scale, "mask_filter_value": MASKED}


def feed_forward(graph: Graph, weights: Weights, block: FeedForward, x: str) -> str:
    """Product, activation function, product; a gate takes the activation function and multiplies what goes up."""
    if not block.gate:
        up = weights.product(graph, block.up, x)
        return weights.product(graph, block.down, activation(graph, block.activation, up))
    both = weights.product(graph, (block.gate, block.up), x)
    gate, up = graph.nodes("Split", [both], [block.gate, block.up], name=f"{block.down}.split", axis=-1, num_outputs=2)
    gated = graph.node("Mul", [activation(graph, block.activation, gate), up])
    return weights.product(graph, block.down, gated)
