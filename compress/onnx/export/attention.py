"""Attention blocks as fused nodes: self-attention over a cache, an encoder's attention, cross-attention.

Shapes: B rows, S new tokens, T tokens so far, R source tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from compress.models.description import AttentionBlock, CrossAttention, Stack
from compress.onnx.export.graph import BOOL, CONTRIB, INT32, Graph
from compress.onnx.export.weights import Weights

MASKED = -1e9
"""Added to the scores of padding; exact in float32, because exp(score - 1e9) is 0."""
TO_THE_END = 2**63 - 1
HEAD_SIZE_MULTIPLE = 8
"""GroupQueryAttention takes head sizes that are multiples of this."""


@dataclass(frozen=True)
class Rotary:
    """Tables of cosines and sines [context, head size / 2], and the position of each new token [B, S]."""

    cosines: str
    sines: str
    positions: str


@dataclass(frozen=True)
class Lengths:
    """What self-attention needs besides queries, keys and values.

    ``padding`` [B, 1, S, T] is added to the scores, ``last`` [B] is the index of the last position, ``total`` is the
    number T of positions. ``rotary`` is None without rotary positions.
    """

    padding: str
    last: str
    total: str
    rotary: Rotary | None = None


def appends_in_place(block: AttentionBlock) -> bool:
    """Return whether GroupQueryAttention computes the block; the present cache may then be the buffer of the past."""
    return block.head_size % HEAD_SIZE_MULTIPLE == 0


def rotary_tables(graph: Graph, weights: Weights, stack: Stack, positions: str) -> Rotary | None:
    """Return the tables of a stack with rotary positions, stored once per graph; None for other stacks."""
    if not stack.rotary:
        return None
    cosines, sines = weights.rotary[stack.rotary]
    return Rotary(
        cosines=graph.weight(f"{stack.rotary}.cos", cosines),
        sines=graph.weight(f"{stack.rotary}.sin", sines),
        positions=positions,
    )


def counted_lengths(graph: Graph, ids: str, past: str) -> Lengths:
    """Return lengths of rows without padding: ``past`` (a vector with one element) positions, then ``ids`` [B, S]."""
    total = graph.node("Add", [past, graph.node("Shape", [ids], start=1, end=2)])
    return _lengths(graph, ids, graph.node("Cast", [total], to=INT32), padding="")


def lengths(graph: Graph, stack: Stack, ids: str, mask: str, rotary: Rotary | None = None) -> Lengths:
    """Derive the lengths from ``attention_mask`` [B, T], once per graph.

    Every row counts as T positions long. A position that the mask hides gets a score of -1e9, so padding may be on
    either side. If a block repeats its keys, positions after the query get that score too.
    """
    new = graph.node("Shape", [ids], start=1, end=2)
    length = graph.node("Cast", [graph.node("Shape", [mask], start=1, end=2)], to=INT32)
    hidden = graph.node("Equal", [mask, graph.integers(0)])
    if any(_repeats(block) for block in stack.attentions):
        padding = _causal_padding(graph, hidden, new, mask)
    else:
        bias = graph.node("Where", [hidden, graph.scalar(MASKED), graph.scalar(0.0)])
        spread = graph.node("Concat", [graph.integers(1, 1), new, graph.integers(1)], axis=0)
        padding = graph.node("Expand", [graph.node("Unsqueeze", [bias, graph.integers(1, 2)]), spread])
    return _lengths(graph, ids, length, padding, rotary)


def _causal_padding(graph: Graph, hidden: str, new: str, mask: str) -> str:
    """Return -1e9 at positions that are hidden or after the query, else 0, [B, 1, S, T]."""
    total = graph.node("Squeeze", [graph.node("Shape", [mask], start=1, end=2)])
    zero, one = graph.number(0), graph.number(1)
    keys = graph.node("Range", [zero, total, one])
    first = graph.node("Sub", [total, graph.node("Squeeze", [new])])
    queries = graph.node("Unsqueeze", [graph.node("Range", [first, total, one]), graph.integers(1)])
    later = graph.node("Greater", [keys, queries])
    masked = graph.node("Or", [graph.node("Unsqueeze", [hidden, graph.integers(1, 2)]), later])
    return graph.node("Where", [masked, graph.scalar(MASKED), graph.scalar(0.0)])


def _lengths(graph: Graph, ids: str, length: str, padding: str, rotary: Rotary | None = None) -> Lengths:
    last = graph.node("Sub", [length, graph.int32(1)])
    rows = graph.node("Expand", [last, graph.node("Shape", [ids], end=1)])
    return Lengths(padding, rows, graph.node("Squeeze", [length]), rotary)


def self_attention(
    graph: Graph, weights: Weights, block: AttentionBlock, x: str, cache: tuple[list[str], list[str]], at: Lengths
) -> str:
    """Add causal attention; ``cache`` names the past and the present key and value [B, kv heads, T, size].

    GroupQueryAttention computes it where it takes the head size: it can append to the cache in place. For other head
    sizes MultiHeadAttention does, which copies the cache.

    Keys enter the cache after their rotation. Nodes of their own rotate queries and keys: the rotation inside
    GroupQueryAttention counts a prompt's positions from its first token, so it is wrong for left padding, and it takes
    fewer head sizes.
    """
    past, present = cache
    projected = weights.product(graph, block.qkv, x)
    if not appends_in_place(block):
        return weights.product(graph, block.out, _copying_attention(graph, block, projected, past, present, at))
    parts = [projected, "", ""] if at.rotary is None else _rotated_parts(graph, block, projected, at.rotary)
    attended = f"{block.out}.input"
    graph.nodes(
        "GroupQueryAttention",
        [*parts, *past, at.last, at.total, *(["", "", "", at.padding] if at.padding else [])],
        [attended, *present],
        name=attended,
        domain=CONTRIB,
        num_heads=block.heads,
        kv_num_heads=block.kv_heads,
        scale=block.scale,
    )
    return weights.product(graph, block.out, attended)


def _copying_attention(
    graph: Graph, block: AttentionBlock, projected: str, past: list[str], present: list[str], at: Lengths
) -> str:
    parts = _rotated_parts(graph, block, projected, at.rotary)
    if _repeats(block):
        return _repeating_attention(graph, block, parts, past, present, at)
    attended = f"{block.out}.input"
    graph.nodes(
        "MultiHeadAttention",
        [*parts, "", "", at.padding, *past],
        [attended, *present],
        name=attended,
        domain=CONTRIB,
        num_heads=block.heads,
        unidirectional=1,
        scale=block.scale,
    )
    return attended


def _repeats(block: AttentionBlock) -> bool:
    """Return True where no operator takes fewer key/value heads than heads, so the keys and values are repeated."""
    return block.kv_heads != block.heads and not appends_in_place(block)


def _repeating_attention(
    graph: Graph, block: AttentionBlock, parts: Sequence[str], past: list[str], present: list[str], at: Lengths
) -> str:
    """Append keys and values to the cache, repeat each for the query heads that share it, and attend."""
    query, *new = parts
    group = block.heads // block.kv_heads
    repeated = []
    for value, before, after in zip(new, past, present, strict=True):
        heads = graph.node("Reshape", [value, graph.integers(0, 0, block.kv_heads, block.head_size)])
        turned = graph.node("Transpose", [heads], perm=[0, 2, 1, 3])
        graph.node("Concat", [before, turned], after, axis=2)
        apart = graph.node("Unsqueeze", [after, graph.integers(2)])
        spread = graph.node("Expand", [apart, graph.integers(1, 1, group, 1, 1)])
        repeated.append(graph.node("Reshape", [spread, graph.integers(0, block.heads, -1, block.head_size)]))
    return graph.node(
        "MultiHeadAttention",
        [query, *repeated, "", "", at.padding],
        f"{block.out}.input",
        domain=CONTRIB,
        num_heads=block.heads,
        scale=block.scale,
    )


def _parts(graph: Graph, block: AttentionBlock, projected: str) -> list[str]:
    parts = [f"{block.out}.{part}" for part in ("query", "key", "value")]
    sizes = [heads * block.head_size for heads in (block.heads, block.kv_heads, block.kv_heads)]
    return graph.split(projected, sizes, parts, name=f"{block.out}.split")


def _rotated_parts(graph: Graph, block: AttentionBlock, projected: str, rotary: Rotary | None) -> list[str]:
    """Query, key and value [B, S, heads * head size]; query and key are rotated if positions are rotary."""
    parts = _parts(graph, block, projected)
    if rotary is None:
        return parts
    inputs = [rotary.positions, rotary.cosines, rotary.sines]
    rotated = [graph.node("RotaryEmbedding", [part, *inputs], f"{part}.rotated", domain=CONTRIB) for part in parts[:2]]
    return [*rotated, parts[2]]


def encoder_attention(graph: Graph, weights: Weights, block: AttentionBlock, x: str, mask: str) -> str:
    """Add attention of every position to every position where ``mask`` [B, S] int32 is not 0."""
    parts = _parts(graph, block, weights.product(graph, block.qkv, x))
    attended = graph.node("MultiHeadAttention", [*parts, "", mask], f"{block.out}.input", **_masked(block))
    return weights.product(graph, block.out, attended)


@dataclass(frozen=True)
class Source:
    """What cross-attention reads besides queries and its cache.

    ``states`` [B, U, E] are the encoder's states that the cache does not cover: all in the first step, none later.
    ``cached`` is true in later steps. ``mask`` [B, R] int32 is 0 at padding.
    """

    states: str
    cached: str
    mask: str


def source(graph: Graph, states: str, mask: str, past: str) -> Source:
    """Derive the source from the states [B, R, E], their mask [B, R], and a cache [B, heads, R or 0, head size]."""
    read = graph.node("Shape", [past], start=2, end=3)
    return Source(
        states=graph.node("Slice", [states, read, graph.integers(TO_THE_END), graph.integers(1)]),
        cached=graph.node("Cast", [graph.node("Squeeze", [read])], to=BOOL),
        mask=graph.node("Cast", [mask], to=INT32),
    )


def cross_attention(
    graph: Graph, weights: Weights, block: CrossAttention, x: str, at: Source, cache: tuple[list[str], list[str]]
) -> str:
    """Add attention of a decoder to an encoder's states; ``cache`` names the past and the present key and value.

    The present holds the keys and values that this step projects. Attention reads the past unless it is empty, and
    else the present, so the cache is never copied. The projections are outside the branches because onnxruntime does
    not prepack weights inside a branch. In later steps they have no rows to compute.
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
    """Return the attributes of a MultiHeadAttention that adds -1e9 to the scores of padding."""
    return {"domain": CONTRIB, "num_heads": block.heads, "scale": block.scale, "mask_filter_value": MASKED}
