"""The floor of a decoding step: bytes counted by hand, the same for torch and its float graph, and a bandwidth."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper

from compress.measure.bandwidth import BYTES, MemoryRead
from compress.measure.floor import model_step_bytes
from compress.models import family_of
from compress.onnx.export.exporter import Packed, write_graphs
from compress.onnx.step_bytes import directory_step_bytes, step_bytes
from compress.surgery.quantization import Quantization, packed_state, quantize

LAYERS, HIDDEN, VOCABULARY, FFN = 2, 32, 67, 48
"""Sizes of the tiny models, whose GPT-2 has an FFN of 4 x 32."""


def exported(model: Any, out: Path, bits: int = 0) -> Path:
    model.save_pretrained(out)
    packed = None
    if bits:
        settings = {"weights": {"bits": bits, "method": "round_to_nearest"}, "embedding": {"bits": bits}}
        quantize(model, family_of(model.config), Quantization.model_validate(settings))
        tensors, spec = packed_state(model)
        packed = Packed(spec, tensors)
    write_graphs(model, out, packed=packed)
    return out


def gpt2_numbers() -> tuple[int, int, int]:
    """Of the matrices, the vectors (biases, normalizations), and one row of both tables."""
    matrices = LAYERS * (4 + 8) * HIDDEN**2 + VOCABULARY * HIDDEN
    vectors = LAYERS * (4 * HIDDEN + 3 * HIDDEN + HIDDEN + 4 * HIDDEN + HIDDEN) + 2 * HIDDEN
    return matrices, vectors, 2 * HIDDEN


def test_every_weight_counts_once_and_a_row_of_each_table(tiny_gpt2: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny_gpt2()
    expected = 4 * sum(gpt2_numbers())
    assert model_step_bytes(model) == expected
    assert directory_step_bytes(exported(model, tmp_path / "onnx")) == expected


@pytest.mark.parametrize("bits", [2, 8])
def test_packed_weights_count_as_they_are_stored(bits: int, tiny_gpt2: Callable[..., Any], tmp_path: Path) -> None:
    matrices, vectors, _ = gpt2_numbers()
    codes = matrices * bits // 8
    scales = 4 * (4 * LAYERS + VOCABULARY)
    row = HIDDEN * bits // 8 + 4 + 4 * HIDDEN  # codes and scale of a token, floats of a position
    assert directory_step_bytes(exported(tiny_gpt2(), tmp_path / "onnx", bits)) == codes + scales + 4 * vectors + row


@pytest.mark.parametrize("bits", [0, 2])
def test_what_an_encoder_computed_is_not_read_again(bits: int, tiny_bart: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny_bart()
    attention = 4 * HIDDEN**2, 4 * HIDDEN
    crossing = 2 * HIDDEN**2, 2 * HIDDEN  # of query and output; keys and values are there
    ffn = 2 * HIDDEN * FFN, FFN + HIDDEN
    matrices, biases = (LAYERS * sum(part) for part in zip(attention, crossing, ffn, strict=True))
    matrices += VOCABULARY * HIDDEN
    vectors = biases + 2 * HIDDEN * (3 * LAYERS + 1) + VOCABULARY
    if not bits:
        assert model_step_bytes(model) == 4 * (matrices + vectors + 2 * HIDDEN)
        assert directory_step_bytes(exported(model, tmp_path / "onnx")) == 4 * (matrices + vectors + 2 * HIDDEN)
        return
    padding = LAYERS * HIDDEN * (64 - FFN)  # 48 inputs of the second product take two blocks of 32
    codes, scales = (matrices + padding) * bits // 8, 4 * (8 * LAYERS + VOCABULARY)
    row = HIDDEN * bits // 8 + 4 + 4 * HIDDEN
    assert directory_step_bytes(exported(model, tmp_path / "onnx", bits)) == codes + scales + 4 * vectors + row


def test_constants_are_followed_to_what_is_stored() -> None:
    """As in the graphs of other tools: an 8-bit weight that is dequantized and transposed at each step."""
    stored = {
        "table": np.zeros((10, 4), np.float32),
        "codes": np.zeros((6, 4), np.int8),
        "scale": np.ones((), np.float32),
        "unused": np.zeros(100, np.float32),
    }
    nodes = [
        helper.make_node("DequantizeLinear", ["codes", "scale"], ["weight"]),
        helper.make_node("Transpose", ["weight"], ["turned"], perm=[1, 0]),
        helper.make_node("Gather", ["table", "input_ids"], ["rows"]),
        helper.make_node("MatMul", ["rows", "turned"], ["logits"]),
        helper.make_node("Add", ["unused", "mask"], ["aside"]),
    ]
    values = [helper.make_tensor_value_info("input_ids", onnx.TensorProto.INT64, ["S"]),
              helper.make_tensor_value_info("mask", onnx.TensorProto.FLOAT, [100])]  # fmt: skip
    out = [helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, None)]
    graph = helper.make_graph(nodes, "g", values, out, [numpy_helper.from_array(v, k) for k, v in stored.items()])
    assert step_bytes(helper.make_model(graph)) == 6 * 4 + 4 + 4 * 4


@pytest.mark.slow
def test_memory_is_read_at_a_speed_that_can_be() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = MemoryRead().bytes_per_second()
    finally:
        torch.set_num_threads(before)
    assert BYTES >= 2**28
    assert 1e8 < found < 1e13
