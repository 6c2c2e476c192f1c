"""The decoding graph: its interface, its nodes, and every shape and activation function of the stock model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from transformers.activations import ACT2CLS

from compress.errors import ModelError
from compress.models import family_of
from compress.onnx.export.activations import ACTIVATIONS, activation
from compress.onnx.export.graph import FLOAT, Graph, save
from compress.surgery.cut import cut

BATCH_1_STEP = {"Transpose", "MatMul", "Gemm", "DequantizeLinear", "QuantizeLinear", "LayerNormalization"}
"""Operators that a step must not contain: each is a slower form of one that is there."""


def shape_of(value: onnx.ValueInfoProto) -> list[int | str]:
    return [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]


def optimized(directory: Path) -> onnx.ModelProto:
    """The graph as onnxruntime runs it: constants folded, nodes fused."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(directory / "optimized.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(directory / "model.onnx", options, providers=["CPUExecutionProvider"])
    return onnx.load(directory / "optimized.onnx")


def test_interface_follows_optimum(exported: Callable[..., Any]) -> None:
    graph = exported().graph.graph
    cache = ["batch_size", 4, "past_sequence_length", 8]
    names = [f"past_key_values.{layer}.{part}" for layer in range(2) for part in ("key", "value")]
    options = {tensor.name for tensor in graph.initializer}
    assert [value.name for value in graph.input if value.name in options] == ["logits_from"]
    assert {value.name: shape_of(value) for value in graph.input if value.name not in options} == {
        "input_ids": ["batch_size", "sequence_length"],
        "attention_mask": ["batch_size", "total_sequence_length"],
        "position_ids": ["batch_size", "sequence_length"],
        **dict.fromkeys(names, cache),
    }
    presents = [name.replace("past_key_values", "present") for name in names]
    assert [value.name for value in graph.output] == ["logits", *presents]
    assert shape_of(graph.output[0]) == ["batch_size", "scored_length", 67]
    assert shape_of(graph.output[1]) == ["batch_size", 4, "total_sequence_length", 8]


@pytest.mark.parametrize("bits", [0, 2])
def test_a_step_runs_fused_nodes_only(exported: Callable[..., Any], bits: int) -> None:
    counts = Counter(node.op_type for node in optimized(exported(bits).directory).graph.node)
    assert not BATCH_1_STEP & set(counts)
    assert counts["GroupQueryAttention"] == counts["FastGelu"] == 2
    assert counts["SkipLayerNormalization"] == 5
    assert counts["MatMulNBits" if bits else "FusedMatMul"] == 9
    assert counts["Cast"] == 1  # the length of the mask, once a graph
    once = {"Shape", "Squeeze", "Sub", "Equal", "Where", "Concat", "Unsqueeze", "Cast", "Expand"}
    per_layer = set(counts) - once
    assert per_layer <= {
        *("GroupQueryAttention", "FastGelu", "SkipLayerNormalization", "MatMulNBits", "FusedMatMul", "Add", "Gather"),
        *("GatherBlockQuantized", "Slice"),
    }
    assert sum(counts[name] for name in once) <= 12


def test_head_sizes_that_are_no_multiple_of_8_take_another_attention(exported: Callable[..., Any]) -> None:
    counts = Counter(node.op_type for node in exported(heads=5, hidden=60).graph.graph.node)
    assert counts["MultiHeadAttention"] == 2
    assert not counts["GroupQueryAttention"]


def test_unequal_heads_and_ffn_export(exported: Callable[..., Any], tiny_gpt2: Callable[..., Any]) -> None:
    model = tiny_gpt2()
    keep = {"layer.0.heads": [1, 3], "layer.1.ffn": list(range(5)), "layer.1.heads": [2]}
    cut(model, family_of(model.config), {axis: torch.tensor(units) for axis, units in keep.items()})
    graph = exported(model=model).graph.graph
    assert [shape_of(value)[1] for value in graph.input if value.name.startswith("past")] == [2, 2, 1, 1]


@pytest.mark.parametrize("tie", [True, False])
def test_float_weights_are_stored_once(exported: Callable[..., Any], tie: bool) -> None:
    found = exported(tie=tie, vocab=500)
    numbers = sum(parameter.numel() for parameter in found.model.parameters())
    assert 4 * numbers <= (found.directory / "model.onnx").stat().st_size <= 4 * numbers + 12_000


@pytest.mark.parametrize(
    "setting", ["scale_attn_weights", "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn"]
)
def test_scaling_of_scores_follows_the_config(
    exported: Callable[..., Any], tiny_gpt2: Callable[..., Any], setting: str
) -> None:
    model = tiny_gpt2()
    setattr(model.config, setting, not getattr(model.config, setting))
    stock = type(model)._from_config(model.config, attn_implementation="eager").eval()
    stock.load_state_dict(model.state_dict())
    assert exported(model=stock).figures["max_logit_error"] < 1e-5


@pytest.mark.parametrize("name", sorted(ACT2CLS))
def test_every_stock_activation_exports_or_is_refused(name: str) -> None:
    graph = Graph("activation")
    graph.input("x", FLOAT, ["n"])
    if name not in ACTIVATIONS:
        assert list(torch.nn.Module.parameters(_stock_activation(name))), "only those with weights are refused"
        with pytest.raises(ModelError, match=name):
            activation(graph, name, "x")
        return
    graph.node("Identity", [activation(graph, name, "x")], "y")
    graph.output("y", FLOAT, ["n"])
    session = ort.InferenceSession(graph.model().SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.linspace(-12, 12, 481, dtype=np.float32)
    expected = _stock_activation(name)(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(session.run(None, {"x": x})[0], expected, rtol=2e-6, atol=2e-6)


def _stock_activation(name: str) -> Any:
    made = ACT2CLS[name]
    return made[0](**made[1]) if isinstance(made, tuple) else made()


def test_an_activation_with_weights_is_refused(exported: Callable[..., Any], tiny_gpt2: Callable[..., Any]) -> None:
    model = tiny_gpt2()
    model.config.activation_function = "prelu"
    with pytest.raises(ModelError, match=r"activation function 'prelu' cannot be exported"):
        exported(model=model)


def test_a_model_without_description_is_refused(tmp_path: Path, tiny_bart: Callable[..., Any]) -> None:
    from compress.onnx.export.exporter import export

    model = tiny_bart()
    model.config.model_type = "t5"
    with pytest.raises(ModelError, match="model_type 't5' is not supported"):
        export(model, tmp_path)


def test_nothing_of_the_machine_is_written(tmp_path: Path) -> None:
    graph = Graph("g")
    graph.input("x", FLOAT, ["n"])
    graph.output(graph.node("Relu", ["x"]), FLOAT, ["n"])
    model = graph.model()
    for part in (model, model.graph, model.graph.node[0], model.graph.input[0]):
        part.doc_string = "/home/user/secret"
        part.metadata_props.add(key="stack", value="/home/user/secret")
    save(model, tmp_path / "model.onnx")
    assert b"secret" not in (tmp_path / "model.onnx").read_bytes()


def test_large_weights_go_to_a_second_file(tmp_path: Path, tiny_gpt2: Callable[..., Any]) -> None:
    from compress.onnx.export.exporter import export

    model = tiny_gpt2()
    model.config.save_pretrained(tmp_path)
    export(model, tmp_path, external_over=50_000)
    assert (tmp_path / "model.onnx").stat().st_size < 20_000
    assert (tmp_path / "model.onnx_data").stat().st_size > 50_000
    stored = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph.initializer
    places = {entry.value for tensor in stored for entry in tensor.external_data if entry.key == "location"}
    assert places == {"model.onnx_data"}
