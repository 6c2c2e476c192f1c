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
from compress.onnx.export.graph import FLOAT, Graph, save
from compress.onnx.export.operators import ACTIVATIONS, activation
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


@pytest.mark.parametrize(("family", "heads"), [("gpt2", 4), ("llama", 2)])
def test_interface_follows_optimum(exported: Callable[..., Any], family: str, heads: int) -> None:
    """A cache has the heads of keys and values."""
    graph = exported(family=family).graph.graph
    cache = ["batch_size", heads, "past_sequence_length", 8]
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
    assert shape_of(graph.output[1]) == ["batch_size", heads, "total_sequence_length", 8]


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("bits", [0, 2])
def test_a_step_of_a_llama_runs_fused_nodes_only(exported: Callable[..., Any], bits: int) -> None:
    """Gate and up are one product; queries and keys are rotated, each by one node."""
    counts = Counter(node.op_type for node in optimized(exported(bits, family="llama").directory).graph.node)
    assert not (BATCH_1_STEP & set(counts))
    assert counts["GroupQueryAttention"] == counts["QuickGelu"] == counts["Mul"] == 2
    assert counts["RotaryEmbedding"] == counts["Split"] == 4
    assert counts["SimplifiedLayerNormalization"] == 1
    assert counts["SkipSimplifiedLayerNormalization"] == 4
    assert counts["MatMulNBits" if bits else "FusedMatMul"] == 9
    assert not counts["Add"]


@pytest.mark.parametrize(
    "options", [{"heads": 5, "hidden": 60}, {"family": "llama", "hidden": 48}, {"family": "llama", "head_dim": 6}]
)
def test_other_head_sizes_than_multiples_of_8_take_another_attention(
    exported: Callable[..., Any], options: dict[str, Any]
) -> None:
    counts = Counter(node.op_type for node in exported(**options).graph.graph.node)
    assert counts["MultiHeadAttention"] == 2
    assert not counts["GroupQueryAttention"]


LLAMA_SHAPES: list[dict[str, Any]] = [
    {"kv_heads": 4},
    {"kv_heads": 2, "tie": True},
    {"kv_heads": 1, "bias": True},
    {"kv_heads": 2, "head_dim": 16},
    {"kv_heads": 4, "head_dim": 24, "layers": 1},
    {"kv_heads": 4, "head_dim": 12, "bias": True},
    {"kv_heads": 2, "head_dim": 6, "tie": True},
    {"kv_heads": 1, "head_dim": 2, "ffn": 45},
]


@pytest.mark.slow
@pytest.mark.parametrize("bits", [0, 2, 4, 8])
@pytest.mark.parametrize("options", LLAMA_SHAPES, ids=str)
def test_every_shape_of_a_llama_passes_the_gate(
    exported: Callable[..., Any], bits: int, options: dict[str, Any]
) -> None:
    found = exported(bits, family="llama", **options)
    assert found.figures["max_logit_error"] <= found.figures["limit"]
    assert found.figures["positions"] > 100
    if bits:
        assert found.figures["products"] == 7 * options.get("layers", 2) + 1
        assert found.figures["max_product_error"] <= 1e-5
    shapes = [shape_of(value) for value in found.graph.graph.input if value.name.startswith("past")]
    assert {(shape[1], shape[3]) for shape in shapes} == {(options["kv_heads"], options.get("head_dim", 8))}


SCALED = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = SCALED | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def scaled_llama(model: Any, rotary: dict[str, Any]) -> Any:
    """The same weights with another kind of rotary positions."""
    settings = model.config.to_dict() | {"rope_scaling": rotary, "rope_parameters": rotary | {"rope_theta": 10000.0}}
    other = type(model)(type(model.config).from_dict(settings)).eval()
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize("rotary", [SCALED, LLAMA3, {"rope_type": "linear", "factor": 2.0}], ids=str)
def test_scaled_rotary_positions_export(
    exported: Callable[..., Any], tiny_llama: Callable[..., Any], rotary: dict[str, Any]
) -> None:
    model = tiny_llama()
    scaled = scaled_llama(model, rotary)
    ids = torch.arange(40)[None] % 67
    with torch.no_grad():
        assert (scaled(ids).logits - model(ids).logits).abs().max() > 1e-2
    assert exported(model=scaled).figures["max_logit_error"] < 1e-5


def test_rotary_positions_that_depend_on_the_length_are_refused(
    exported: Callable[..., Any], tiny_llama: Callable[..., Any]
) -> None:
    model = scaled_llama(tiny_llama(), {"rope_type": "dynamic", "factor": 2.0})
    with pytest.raises(ModelError, match="'dynamic'.*length"):
        exported(model=model)


def test_unequal_heads_and_ffn_export(exported: Callable[..., Any], tiny_gpt2: Callable[..., Any]) -> None:
    model = tiny_gpt2()
    keep = {"layer.0.heads": [1, 3], "layer.1.ffn": list(range(5)), "layer.1.heads": [2]}
    cut(model, family_of(model.config), {axis: torch.tensor(units) for axis, units in keep.items()})
    graph = exported(model=model).graph.graph
    assert [shape_of(value)[1] for value in graph.input if value.name.startswith("past")] == [2, 2, 1, 1]


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize(("family", "tables"), [("gpt2", 0), ("llama", 2 * 64 * 4)])
def test_float_weights_are_stored_once(exported: Callable[..., Any], family: str, tables: int, tie: bool) -> None:
    """So are the cosines and sines of rotary positions."""
    found = exported(family=family, tie=tie, vocab=500)
    numbers = sum(parameter.numel() for parameter in found.model.parameters()) + tables
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
