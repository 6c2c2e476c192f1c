"""Build the graphs of an encoder-decoder model from its description and its weights, float or packed."""

from __future__ import annotations

import onnx

from compress.errors import ModelError
from compress.models.description import AttentionBlock, Block, CrossAttention, FeedForward, Stack
from compress.onnx.export.attention import (
    appends_in_place,
    counted_lengths,
    cross_attention,
    encoder_attention,
    self_attention,
    source,
)
from compress.onnx.export.graph import FLOAT, INT32, INT64, Graph
from compress.onnx.export.operators import chain, counted_embeddings, feed_forward
from compress.onnx.export.weights import Weights
from compress.onnx.names import GROWING, both_caches, cache_names

BATCH, SOURCE, NEW = "batch_size", "encoder_sequence_length", "decoder_sequence_length"
PAST, TOTAL, READ = "past_decoder_sequence_length", "total_decoder_sequence_length", "past_encoder_sequence_length"
PROJECTED = "projected_encoder_sequence_length"


def encoder_graph(stack: Stack, weights: Weights) -> onnx.ModelProto:
    """Build the encoder: ``input_ids`` and ``attention_mask`` [B, R] to ``last_hidden_state`` [B, R, D]."""
    _require_learned_positions(stack, "encoder")
    graph = Graph("encoder")
    ids = graph.input("input_ids", INT64, [BATCH, SOURCE])
    mask = graph.node("Cast", [graph.input("attention_mask", INT64, [BATCH, SOURCE])], to=INT32)

    def output(block: Block, x: str) -> str:
        if isinstance(block, FeedForward):
            return feed_forward(graph, weights, block, x)
        assert isinstance(block, AttentionBlock)
        return encoder_attention(graph, weights, block, x, mask)

    start = counted_embeddings(graph, weights, stack, ids)
    graph.node("Identity", [chain(graph, weights, stack, start, output)], "last_hidden_state")
    graph.output("last_hidden_state", FLOAT, [BATCH, SOURCE, weights.vectors[f"{stack.norm}.weight"].size])
    return graph.model()


def decoder_graph(stack: Stack, weights: Weights) -> onnx.ModelProto:
    """Build the decoder: one graph for the first step and all later steps.

    Inputs, after optimum's conventions: ``encoder_attention_mask`` [B, R], ``input_ids`` [B, S],
    ``encoder_hidden_states`` [B, R, E], ``past_key_values.i.decoder.{key,value}`` [B, heads, P, head size] and
    ``past_key_values.i.encoder.{key,value}`` [B, heads, R or 0, head size]. Outputs: ``logits`` [B, S, V] and
    ``present.*`` in the same order. In the first step the encoder's past is
    empty: the graph projects the encoder's states and returns them as its present. In later steps that present is
    empty, and the caller passes the first one as the past.
    """
    _require_learned_positions(stack, "decoder")
    graph = Graph(GROWING)
    mask = graph.input("encoder_attention_mask", INT64, [BATCH, SOURCE])
    ids = graph.input("input_ids", INT64, [BATCH, NEW])
    width = weights.matrices[stack.crossings[0].key].columns
    states = graph.input("encoder_hidden_states", FLOAT, [BATCH, SOURCE, width])
    pairs = list(zip(stack.attentions, stack.crossings, strict=True))
    for index, (own, crossing) in enumerate(pairs):
        for side, block, length in (("decoder", own, PAST), ("encoder", crossing, READ)):
            for name in cache_names("past_key_values", index, side):
                graph.input(name, FLOAT, _cache_shape(block, length))
    own_cache, cross_cache = (cache_names("past_key_values", 0, side)[0] for side in ("decoder", "encoder"))
    past = graph.node("Shape", [own_cache], start=2, end=3)
    unread = source(graph, states, mask, cross_cache)
    at = counted_lengths(graph, ids, past)
    layer = {block: index for index, pair in enumerate(pairs) for block in pair}

    def output(block: Block, x: str) -> str:
        if isinstance(block, FeedForward):
            return feed_forward(graph, weights, block, x)
        if isinstance(block, CrossAttention):
            return cross_attention(graph, weights, block, x, unread, both_caches(layer[block], "encoder"))
        return self_attention(graph, weights, block, x, both_caches(layer[block], "decoder"), at)

    start = counted_embeddings(graph, weights, stack, ids, past)
    _logits(graph, weights, stack, chain(graph, weights, stack, start, output))
    for index, (own, crossing) in enumerate(pairs):
        for side, block, length in (("decoder", own, TOTAL), ("encoder", crossing, PROJECTED)):
            for name in cache_names("present", index, side):
                graph.output(name, FLOAT, _cache_shape(block, length))
    return graph.model()


def _cache_shape(block: AttentionBlock | CrossAttention, length: str) -> list[int | str]:
    heads = block.kv_heads if isinstance(block, AttentionBlock) else block.heads
    return [BATCH, heads, length, block.head_size]


def _require_learned_positions(stack: Stack, side: str) -> None:
    """Raise ModelError for rotary positions and for key/value heads that these graphs cannot compute."""
    if stack.rotary:
        raise ModelError(f"{side}: rotary positions in an encoder-decoder model cannot be exported to ONNX")
    for block in stack.attentions:
        grouped = block.kv_heads != block.heads
        if grouped and (side == "encoder" or not appends_in_place(block)):
            raise ModelError(
                f"{side}: {block.kv_heads} key/value heads for {block.heads} heads of size {block.head_size} cannot "
                "be exported to ONNX in an encoder-decoder model"
            )


def _logits(graph: Graph, weights: Weights, stack: Stack, states: str) -> None:
    bias = weights.vectors.get(stack.logits_bias)
    if bias is None or not bias.any():
        weights.product(graph, stack.head, states, "logits")
    else:
        product = weights.product(graph, stack.head, states)
        graph.node("Add", [product, weights.vector(graph, stack.logits_bias)], "logits")
    graph.output("logits", FLOAT, [BATCH, NEW, weights.matrices[stack.head].outputs])
