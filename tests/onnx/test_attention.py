"""Self-attention nodes alone against float64, with rotary positions and shared key/value heads."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from compress.models.description import AttentionBlock, Stack
from compress.models.layout import rotary_tables
from compress.onnx.export.attention import lengths, self_attention
from compress.onnx.export.attention import rotary_tables as stored_tables
from compress.onnx.export.graph import FLOAT, INT64, Graph
from compress.onnx.export.matrices import FloatMatrix
from compress.onnx.export.weights import Weights
from compress.onnx.names import both_caches

CONTEXT, WIDTH = 32, 20


def rotary(size: int) -> LlamaRotaryEmbedding:
    return LlamaRotaryEmbedding(
        LlamaConfig(hidden_size=size, num_attention_heads=1, max_position_embeddings=CONTEXT, head_dim=size)
    )


def block_of(heads: int, kv_heads: int, size: int) -> AttentionBlock:
    return AttentionBlock("", ("q", "k", "v"), "out", heads, kv_heads, size, size**-0.5)


def attention_session(block: AttentionBlock, values: dict[str, Any]) -> ort.InferenceSession:
    """A graph of the block alone, on x [B, S, WIDTH]."""
    cosines, sines = (table.numpy() for table in rotary_tables(rotary(block.head_size)))
    matrices = {name: FloatMatrix(f"{name}.weight", value.astype(np.float32)) for name, value in values.items()}
    weights = Weights(matrices, {}, {}, {"rotary": (cosines, sines)})
    stack = Stack("", "", (block,), "", "", True, rotary="rotary")
    graph = Graph("attention")
    graph.input("x", FLOAT, ["b", "s", WIDTH])
    inputs = [graph.input(name, INT64, ["b", length]) for name, length in zip("imp", "sts", strict=True)]
    past, present = both_caches(0)
    for name in past:
        graph.input(name, FLOAT, ["b", block.kv_heads, "past", block.head_size])
    at = lengths(graph, stack, *inputs[:2], stored_tables(graph, weights, stack, inputs[2]))
    graph.output(self_attention(graph, weights, block, "x", (past, present), at), FLOAT, None)
    for name in present:
        graph.output(name, FLOAT, None)
    return ort.InferenceSession(graph.model().SerializeToString(), providers=["CPUExecutionProvider"])


def reference(block: AttentionBlock, values: dict[str, Any], x: Any, mask: Any, positions: Any) -> Any:
    """softmax(scale rotated(q) rotated(k)^T) v in float64, rotated by the stock function, key/value heads repeated."""

    def heads(name: str, count: int) -> torch.Tensor:
        return (x @ torch.from_numpy(values[name]).T).unflatten(-1, (count, block.head_size)).transpose(1, 2)

    angles = positions[..., None].double() * rotary(block.head_size).inv_freq.double()
    tables = torch.cat((angles, angles), dim=-1)
    query, key = apply_rotary_pos_emb(heads("q", block.heads), heads("k", block.kv_heads), tables.cos(), tables.sin())
    value = heads("v", block.kv_heads)
    group = block.heads // block.kv_heads
    key, value = (each.repeat_interleave(group, dim=1) for each in (key, value))
    visible = torch.ones(x.shape[1], x.shape[1]).tril().bool() & (mask[:, None, None] == 1)
    scores = (block.scale * query @ key.transpose(-1, -2)).masked_fill(~visible, -1e9)
    return (scores.softmax(-1) @ value).transpose(1, 2).flatten(2) @ torch.from_numpy(values["out"]).T


@pytest.mark.parametrize("size", [2, 6, 8, 12, 16, 24, 64])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 2), (3, 1)])
@pytest.mark.parametrize("pieces", [(9,), (1,) * 9, (5, 1, 3)], ids=str)
def test_rotated_attention_equals_float64(size: int, heads: int, kv_heads: int, pieces: tuple[int, ...]) -> None:
    """Rows with left padding, each position by its number in its row, in one call and through the cache."""
    generator = np.random.default_rng(0)
    block = block_of(heads, kv_heads, size)
    outputs = {"q": heads * size, "k": kv_heads * size, "v": kv_heads * size}
    values = {name: generator.normal(size=(rows, WIDTH)) / 2 for name, rows in outputs.items()}
    values["out"] = generator.normal(size=(7, heads * size)) / 2
    values = {name: value.astype(np.float32).astype(np.float64) for name, value in values.items()}
    session = attention_session(block, values)
    rows, length = 3, sum(pieces)
    x = generator.normal(size=(rows, length, WIDTH)).astype(np.float32)
    mask = (np.arange(length) >= np.array([0, 2, 4])[:, None]).astype(np.int64)
    positions = (mask.cumsum(-1) - 1).clip(min=0)
    expected = reference(block, values, *(torch.from_numpy(each) for each in (x.astype(np.float64), mask, positions)))
    for row in range(rows):  # GroupQueryAttention takes several tokens on a past for one row only
        own = slice(row, row + 1) if len(pieces) > 1 else slice(None)
        caches = [np.zeros((len(x[own]), kv_heads, 0, size), np.float32)] * 2
        found, start = [], 0
        for piece in pieces:
            at = slice(start, start + piece)
            feeds = {"x": x[own, at], "i": mask[own, at], "m": mask[own, : at.stop], "p": positions[own, at]}
            y, *caches = session.run(None, feeds | dict(zip(both_caches(0)[0], caches, strict=True)))
            found.append(y)
            start += piece
        real = mask[own] == 1
        np.testing.assert_allclose(np.concatenate(found, 1)[real], expected.numpy()[own][real], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("size", [2, 8, 64])
def test_tables_are_those_of_the_stock_module(size: int) -> None:
    module = rotary(size)
    cosines, sines = rotary_tables(module)
    expected = module(torch.zeros(1), torch.arange(CONTEXT)[None])
    for ours, theirs in zip((cosines, sines), expected, strict=True):
        assert torch.equal(ours, theirs[0, :, : size // 2])
