"""Build the decoding graph of a causal model from its description and its weights, float or packed."""

from __future__ import annotations

import onnx

from compress.models.description import AttentionBlock, Block, FeedForward, Stack
from compress.onnx.export.attention import TO_THE_END, appends_in_place, lengths, rotary_tables, self_attention
from compress.onnx.export.graph import FLOAT, INT64, Graph
from compress.onnx.export.operators import chain, embeddings, feed_forward
from compress.onnx.export.weights import Weights
from compress.onnx.names import GROWING, IN_PLACE, LOGITS_FROM, both_caches, cache_names

BATCH, NEW, PAST, TOTAL = "batch_size", "sequence_length", "past_sequence_length", "total_sequence_length"
SCORED = "scored_length"


def decoding_graph(stack: Stack, weights: Weights) -> onnx.ModelProto:
    """Build the graph; its names and shapes follow optimum's conventions for causal models with a cache.

    Inputs: ``input_ids`` [B, S], ``attention_mask`` [B, T], ``position_ids`` [B, S], ``past_key_values.i.{key,value}``
    [B, key/value heads, T - S, head size]. Outputs: ``logits`` [B, S, V], ``present.i.{key,value}``
    [B, key/value heads, T, head size]. ``logits_from`` [1] is optional: the first position whose logits are computed,
    -1 for the last position alone. S >= 1 and T >= S. Where the head size allows GroupQueryAttention, S > 1 on a past
    takes B = 1, and a past and its present may be one buffer longer than T.
    """
    attentions = stack.attentions
    graph = Graph(IN_PLACE if all(appends_in_place(block) for block in attentions) else GROWING)
    ids = graph.input("input_ids", INT64, [BATCH, NEW])
    mask = graph.input("attention_mask", INT64, [BATCH, TOTAL])
    positions = graph.input("position_ids", INT64, [BATCH, NEW])
    for index, block in enumerate(attentions):
        for name in cache_names("past_key_values", index):
            graph.input(name, FLOAT, [BATCH, block.kv_heads, PAST, block.head_size])
    start = embeddings(graph, weights, stack, ids, positions)
    at = lengths(graph, stack, ids, mask, rotary_tables(graph, weights, stack, positions))
    layer = {block: index for index, block in enumerate(attentions)}

    def block_output(block: Block, x: str) -> str:
        if isinstance(block, FeedForward):
            return feed_forward(graph, weights, block, x)
        assert isinstance(block, AttentionBlock)
        return self_attention(graph, weights, block, x, both_caches(layer[block]), at)

    states = chain(graph, weights, stack, start, block_output)
    scored = [states, graph.option(LOGITS_FROM, 0), graph.integers(TO_THE_END), graph.integers(1)]
    weights.product(graph, stack.head, graph.node("Slice", scored), "logits")
    graph.output("logits", FLOAT, [BATCH, SCORED, weights.matrices[stack.head].outputs])
    for index, block in enumerate(attentions):
        for name in cache_names("present", index):
            graph.output(name, FLOAT, [BATCH, block.kv_heads, TOTAL, block.head_size])
    return graph.model()
