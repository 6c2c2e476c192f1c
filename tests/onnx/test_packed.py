"""Packed graphs: the bytes of codes and scales, shared where modules share, and the same numbers as torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from compress.models.structure import stock_tensors
from compress.onnx.names import MODEL_FILE
from compress.onnx.runtime import Runtime
from compress.surgery.quantize import packed_bytes

GRAPH_BYTES = 12_000
"""Upper bound for what the nodes of a tiny graph take."""


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("hidden", [32, 36, 128])
def test_every_width_and_padded_columns(exported: Callable[..., Any], bits: int, hidden: int) -> None:
    found = exported(bits, hidden=hidden, layers=1)
    assert found.figures["products"] == 5
    assert found.figures["max_product_error"] <= 1e-5
    assert found.figures["max_float_logit_error"] <= found.figures["float_limit"]


@pytest.mark.parametrize("tie", [True, False])
def test_the_file_is_codes_scales_and_floats(
    exported: Callable[..., Any], tiny_gpt2: Callable[..., Any], tie: bool
) -> None:
    model = tiny_gpt2(vocab=1000, tie=tie)
    elements = sum(tensor.numel() for tensor in stock_tensors(model))
    found = exported(2, embedding=4, model=model)
    size = (found.directory / "model.onnx").stat().st_size
    expected = packed_bytes(found.packed.spec, elements)
    assert expected <= size <= expected + GRAPH_BYTES


def test_embedding_and_head_share_codes(exported: Callable[..., Any]) -> None:
    graph = exported(4).graph.graph
    codes = [tensor.name for tensor in graph.initializer if tensor.name.endswith(".codes")]
    assert codes.count("transformer.wte.codes") == 1
    assert "lm_head.codes" not in codes
    (head,) = [node for node in graph.node if node.name == "lm_head"]
    assert head.input[1] == "transformer.wte.codes"


def test_one_scale_a_matrix_is_one_number_on_disk(exported: Callable[..., Any]) -> None:
    graph = exported(2).graph.graph
    scales = [tensor for tensor in graph.initializer if "scales" in tensor.name]
    assert [list(tensor.dims) for tensor in scales] == [[67, 1]]


def test_rows_of_the_embedding_are_exact(exported: Callable[..., Any]) -> None:
    """GatherBlockQuantized gives codes * scale to the last bit, padding cut off."""
    found = exported(3, embedding=2, hidden=36)
    extended = found.graph
    (first,) = [node for node in extended.graph.node if node.name == "transformer.h.0.ln_1"]
    extended.graph.output.append(onnx.helper.make_tensor_value_info(first.input[1], 1, None))
    onnx.save(extended, found.directory / "model.onnx")
    session = Runtime.open(found.directory)._sessions[MODEL_FILE]
    ids = np.arange(67)[None]
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.zeros_like(ids)}
    for value in session.get_inputs()[3:]:
        feeds[value.name] = np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
    with torch.no_grad():
        expected = found.model.transformer.wte(torch.from_numpy(ids)).numpy()
    assert np.array_equal(session.run([first.input[1]], feeds)[0], expected)
