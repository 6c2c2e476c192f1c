"""The graphs of an encoder-decoder model, built node by node from its description and weights, float and packed."""

from __future__ import annotations

import onnx

from compress.models.description import AttentionBlock, Block, CrossAttention, FeedForward, Stack
from compress.onnx.export.graph import FLOAT, INT32, INT64, Graph
from compress.onnx.export.operators import (
    chain,
    counted_lengths,
    counted_positions,
    cross_attention,
    encoder_attention,
    feed_forward,
    self_attention,
    source,
    tokens,
)
from compress.onnx.export.weights import Weights
from compress.onnx.names import GROWING, both_caches, cache_names

BATCH, SOURCE, NEW = "batch_size", "encoder_sequence_length", "decoder_sequence_length"
PAST, TOTAL, READ = "past_decoder_sequence_length", "total_decoder_sequence_length", "past_encoder_sequence_length"
PROJECTED = "projected_encoder_sequence_length"


def encoder_graph(stack: Stack, weights: Weights) -> onnx.ModelProto:
    """Build the encoder: ``input_ids`` and ``attention_mask`` [B, R] to ``last_hidden_state`` [B, R, D]."""
    graph = Graph("encoder")
    ids = graph.input("input_ids", INT64, [BATCH, SOURCE])
    mask = graph.node("Cast", [graph.input("attention_mask", INT64, [BATCH, SOURCE])], to=INT32)

    def output(block: Block, x: str) -> str:
        if isinstance(block, FeedForward):
            return feed_forward(graph, weights, block, x)
        assert isinstance(block, AttentionBlock)
        return encoder_attention(graph, weights, block, x, mask)

    start = tokens(graph, weights, stack, ids), counted_positions(graph, weights, stack, ids)
    graph.node("Identity", [chain(graph, weights, stack, start, output)], "last_hidden_state")
    graph.output("last_hidden_state", FLOAT, [BATCH, SOURCE, weights.vectors[f"{stack.norm}.weight"].size])
    return graph.model()


def decoder_graph(stack: Stack, weights: Weights) -> onnx.ModelProto:
    """Build the decoder, one graph for the first step and all later ones.

    Inputs, after optimum's conventions: ``encoder_attention_mask`` [B, R], ``input_ids`` [B, S],
    ``encoder_hidden_states`` [B, R, E], ``past_key_values.i.decoder.{key,value}`` [B, heads, P, head size] and
    ``past_key_values.i.encoder.{key,value}`` [B, heads, R or 0, head size]. Outputs: ``logits`` [B, S, V] and
    ``present.*`` in the same order. While the past of the encoder's states is empty, they are projected and are its
    present; afterwards that present is empty, and the past goes on serving.
    """
    graph = Graph(GROWING)
    mask = graph.input("encoder_attention_mask", INT64, [BATCH, SOURCE])
    ids = graph.input("input_ids", INT64, [BATCH, NEW])
    width = weights.matrices[stack.crossings[0].key].columns
    states = graph.input("encoder_hidden_states", FLOAT, [BATCH, SOURCE, width])
    pairs = list(zip(stack.attentions, stack.crossings, strict=True))
    for index, (own, crossing) in enumerate(pairs):
        for side, block, length in (("decoder", own, PAST), ("encoder", crossing, READ)):
            for name in cache_names("past_key_values", index, side):
                graph.input(name, FLOAT, [BATCH, block.heads, length, block.head_size])
    own_cache, cross_cache = (cache_names("past_key_values", 0, side)[0] for side in ("decoder", "encoder"))
    past = graph.node("Shape", [own_cache], start=2, end=3)
    asked = source(graph, states, mask, cross_cache)
    at = counted_lengths(graph, ids, past)
    layer = {block: index for index, pair in enumerate(pairs) for block in pair}

    def output(block: Block, x: str) -> str:
        if isinstance(block, FeedForward):
            return feed_forward(graph, weights, block, x)
        if isinstance(block, CrossAttention):
            return cross_attention(graph, weights, block, x, asked, both_caches(layer[block], "encoder"))
        return self_attention(graph, weights, block, x, both_caches(layer[block], "decoder"), at)

    start = tokens(graph, weights, stack, ids), counted_positions(graph, weights, stack, ids, past)
    _logits(graph, weights, stack, chain(graph, weights, stack, start, output))
    for index, (own, crossing) in enumerate(pairs):
        for side, block, length in (("decoder", own, TOTAL), ("encoder", crossing, PROJECTED)):
            for name in cache_names("present", index, side):
                graph.output(name, FLOAT, [BATCH, block.heads, length, block.head_size])
    return graph.model()


def _logits(graph: Graph, weights: Weights, stack: Stack, states: str) -> None:
    bias = weights.vectors.get(stack.logits_bias)
    if bias is None or not bias.any():
        weights.product(graph, stack.head, states, "logits")
    else:
        product = weights.product(graph, stack.head, states)
        graph.node("Add", [product, weights.vector(graph, stack.logits_bias)], "logits")
    graph.output("logits", FLOAT, [BATCH, NEW, weights.matrices[stack.head].outputs])
