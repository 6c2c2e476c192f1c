"""Packed graphs: the bytes of codes and scales, shared where modules share, and the same numbers as torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from compress.models.structure import stock_tensors
from compress.onnx.export.parity.products import _places, _run_alone
from compress.onnx.names import DECODER_FILE, ENCODER_FILE, MODEL_FILE
from compress.onnx.runtime import Runtime
from compress.surgery.quantization import Product, packed_bytes

from .conftest import FLOAT16

GRAPH_BYTES = 12_000
"""Upper bound for what the nodes of a tiny graph take."""
LLAMA_GRAPH_BYTES = 14_000
"""The same for a Llama, which has seven products a layer in place of four."""


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("hidden", [32, 36, 128])
def test_every_width_and_padded_columns(exported: Callable[..., Any], bits: int, hidden: int) -> None:
    found = exported(bits, hidden=hidden, layers=1)
    assert found.figures["products"] == 5
    assert found.figures["max_product_error"] <= 1e-5
    assert found.figures["max_float_logit_error"] <= found.figures["float_limit"]


GRANULARITIES = [
    {"granularity": "row"},
    {"granularity": "group", "rows": "group"},
    {"granularity": "group", "rows": "group", "store": FLOAT16},
    {"store": FLOAT16},
]


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("hidden", [36, 96])
@pytest.mark.parametrize("quantization", GRANULARITIES, ids=["row", "group", "group-float16", "float16"])
@pytest.mark.parametrize("family", [{}, {"family": "llama", "heads": 3, "kv_heads": 1}], ids=["gpt2", "llama"])
def test_every_granularity(
    exported: Callable[..., Any], family: dict[str, Any], bits: int, hidden: int, quantization: dict[str, Any]
) -> None:
    found = exported(bits, hidden=hidden, layers=1, quantization=quantization, **family)
    assert found.figures["products"] == (8 if family else 5)
    assert found.figures["max_product_error"] <= 1e-5
    assert found.figures["max_float_logit_error"] <= found.figures["float_limit"]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "bart", "llama"])
@pytest.mark.parametrize("width", [640, 512, 384, 192, 72])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("quantization", [{}, GRANULARITIES[2]], ids=["tensor", "group-float16"])
def test_the_kernel_reads_the_weights_of_the_artifact(
    exported: Callable[..., Any], request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch,
    family: str, width: int, bits: int, quantization: dict[str, Any],
) -> None:  # fmt: skip
    """The bytes of each product, fused ones too, are the artifact's; times 1 they are its weights to the last bit."""
    monkeypatch.setattr("compress.onnx.export.exporter.check_parity", lambda *_, **__: {})  # seconds a width
    model = request.getfixturevalue(f"tiny_{family}")(layers=1, hidden=width, ffn=width // 2)
    found = exported(bits, model=model, quantization={"method": "round_to_nearest", **quantization})
    files = [file for file in (MODEL_FILE, ENCODER_FILE, DECODER_FILE) if (found.directory / file).exists()]
    specs = {matrix.module: matrix for matrix in found.packed.spec.matrices}
    seen = set()
    for file in files:
        graph = onnx.load(found.directory / file)
        stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.graph.initializer}
        for module, (_, node, outputs) in _places(file, graph, found.packed.spec.matrices):
            codes = found.packed.tensors[f"{specs[module].shares or module}.codes"]
            assert np.array_equal(stored[node.input[1]][outputs], codes.numpy()), module
            exact = onnx.NodeProto()
            exact.CopyFrom(node)
            del exact.input[3:]  # no bias
            next(each for each in exact.attribute if each.name == "accuracy_level").i = 0
            weight = _run_alone(graph, exact, np.eye(specs[module].shape[1], dtype=np.float32))[0][:, outputs].T
            assert np.array_equal(weight, found.model.get_submodule(module).weight.detach().numpy()), module
            seen.add(module)
    assert seen == {name for name in specs if isinstance(found.model.get_submodule(name), Product)}
    assert any("+" in node.name for node in graph.graph.node) == (family != "gpt2")


@pytest.mark.slow
@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("quantization", [{}, *GRANULARITIES], ids=str)
@pytest.mark.parametrize(
    ("family", "tables", "nodes"), [("gpt2", 0, GRAPH_BYTES), ("llama", 2 * 4 * 64 * 4, LLAMA_GRAPH_BYTES)]
)
def test_the_file_is_codes_scales_and_floats(
    exported: Callable[..., Any], request: pytest.FixtureRequest, family: str, tables: int, nodes: int, tie: bool,
    quantization: dict[str, Any],
) -> None:  # fmt: skip
    """A Llama's file also holds the cosines and sines of its rotary positions."""
    model = request.getfixturevalue(f"tiny_{family}")(vocab=1000, tie=tie)
    elements = sum(tensor.numel() for tensor in stock_tensors(model))
    found = exported(2, embedding=4, model=model, quantization=quantization)
    size = (found.directory / "model.onnx").stat().st_size
    expected = packed_bytes(found.packed.spec, elements) + tables
    assert expected <= size <= expected + nodes


@pytest.mark.slow
def test_embedding_and_head_share_codes(exported: Callable[..., Any]) -> None:
    graph = exported(4).graph.graph
    codes = [tensor.name for tensor in graph.initializer if tensor.name.endswith(".codes")]
    assert codes.count("transformer.wte.codes") == 1
    assert "lm_head.codes" not in codes
    (head,) = [node for node in graph.node if node.name == "lm_head"]
    assert head.input[1] == "transformer.wte.codes"


@pytest.mark.slow
def test_one_scale_a_matrix_is_one_number_on_disk(exported: Callable[..., Any]) -> None:
    graph = exported(2).graph.graph
    scales = [tensor for tensor in graph.initializer if "scales" in tensor.name]
    assert [list(tensor.dims) for tensor in scales] == [[67, 1]]


@pytest.mark.slow
def test_what_is_stored_in_half_is_half_on_disk(exported: Callable[..., Any]) -> None:
    found = exported(2, hidden=36, quantization=GRANULARITIES[2])
    tensors = found.packed.tensors
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in found.graph.graph.initializer}
    halves = {name: value for name, value in stored.items() if value.dtype == np.float16}
    assert np.array_equal(halves.pop("transformer.wpe.weight"), tensors["transformer.wpe.weight"].numpy())
    assert len(halves) == 9  # four products a layer, and the one matrix of embedding and head
    for name, value in halves.items():
        assert np.array_equal(value, tensors[name.replace(".scales", ".scale")].numpy())
    casts = [node.input[0] for node in found.graph.graph.node if node.op_type == "Cast" and node.input[0] in stored]
    assert sorted(casts) == sorted([*halves, "transformer.wpe.weight"])  # each once, also where two nodes read it


@pytest.mark.slow
@pytest.mark.parametrize("quantization", [{}, *GRANULARITIES[1:]], ids=str)
def test_rows_of_the_embedding_are_exact(exported: Callable[..., Any], quantization: dict[str, Any]) -> None:
    """GatherBlockQuantized gives codes * scale to the last bit, padding cut off."""
    found = exported(3, embedding=2, hidden=36, quantization=quantization)
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
