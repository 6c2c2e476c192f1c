"""The graphs of an encoder and its decoder: interface, nodes, bytes, and every shape of the stock model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from compress.errors import ParityError
from compress.models import family_of
from compress.models.structure import stock_tensors
from compress.onnx.export.parity.check import check_parity
from compress.onnx.names import DECODER_FILE, ENCODER_FILE, SHARED_FILE
from compress.onnx.runtime import Runtime
from compress.surgery.cut import cut
from compress.surgery.quantization import packed_bytes

from .conftest import FLOAT16
from .test_decoding_graph import BATCH_1_STEP, shape_of

GROUPS = {"granularity": "group", "rows": "group"}

GRAPHS_BYTES = 40_000
"""Upper bound for what the nodes of two tiny graphs take."""


@pytest.fixture
def bart(exported: Callable[..., Any]) -> Callable[..., Any]:
    """A function that exports a random BART, or an mBART: bits (0: float), options as ``exported`` takes them."""

    def make(
        bits: int = 0, *, family: str = "bart", quantization: Mapping[str, Any] | None = None, **options: Any
    ) -> Any:
        return exported(bits, family=family, quantization=quantization or {}, **options)

    return make


def graph_of(found: Any, file: str) -> onnx.GraphProto:
    return onnx.load(found.directory / file).graph


def optimized(path: Path) -> Counter[str]:
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(path.with_suffix(".optimized"))
    options.log_severity_level = 3
    ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in nodes_of(onnx.load(path.with_suffix(".optimized")).graph))


def nodes_of(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """The nodes of a graph and of its branches."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from nodes_of(attribute.g)


def test_interface_follows_optimum(bart: Callable[..., Any]) -> None:
    found = bart(decoder_heads=2)
    encoder, decoder = graph_of(found, ENCODER_FILE), graph_of(found, DECODER_FILE)
    assert [value.name for value in encoder.input] == ["input_ids", "attention_mask"]
    assert [value.name for value in encoder.output] == ["last_hidden_state"]
    sides = [f"{layer}.{side}" for layer in (0, 1) for side in ("decoder", "encoder")]
    caches = [f"{side}.{part}" for side in sides for part in ("key", "value")]
    named = ["encoder_attention_mask", "input_ids", "encoder_hidden_states"]
    assert [value.name for value in decoder.input] == named + [f"past_key_values.{cache}" for cache in caches]
    assert [value.name for value in decoder.output] == ["logits"] + [f"present.{cache}" for cache in caches]
    assert all(shape_of(value)[1::2] == [2, 16] for value in (*decoder.input[3:], *decoder.output[1:]))


@pytest.mark.slow
@pytest.mark.parametrize("bits", [0, 2])
def test_a_step_runs_fused_nodes_only(bart: Callable[..., Any], bits: int) -> None:
    found = bart(bits)
    counts = optimized(found.directory / DECODER_FILE)
    assert not (BATCH_1_STEP - {"Transpose"}) & set(counts)
    assert counts["GroupQueryAttention"] == counts["If"] == 2
    assert counts["MultiHeadAttention"] == 2 * 2  # one in either branch
    assert counts["SkipLayerNormalization"] == 7
    product = "MatMulNBits" if bits else "FusedMatMul"
    assert counts[product] == 2 * (1 + 1 + 1 + 1 + 1 + 2) + 1  # qkv, out, query, key and value, out, FFN; head
    assert counts["Transpose"] == counts["Reshape"] == 2  # of keys and values not seen before
    assert counts["Concat"] == 0  # GroupQueryAttention itself copies its cache into one that is a position longer


@pytest.mark.slow
@pytest.mark.parametrize("bits", [0, 2])
@pytest.mark.parametrize(
    "options",
    [
        {"layers": 1, "heads": 1},
        {"layers": 1, "decoder_layers": 3, "ffn": 13, "decoder_ffn": 7},
        {"layers": 3, "decoder_layers": 1, "heads": 1, "decoder_heads": 4},
        {"heads": 4, "decoder_heads": 2},
        {"heads": 2, "decoder_heads": 4},
        {"hidden": 36, "heads": 3},  # head size 12, which GroupQueryAttention refuses
        {"scale_embedding": True},
        {"tie": False},
        {"family": "mbart", "layers": 1, "decoder_layers": 3, "heads": 1},
        {"family": "mbart", "hidden": 36, "heads": 3, "scale_embedding": True},
        {"family": "mbart", "tie": False, "decoder_heads": 2},
    ],
    ids=str,
)
def test_every_shape_passes_the_gate(bart: Callable[..., Any], bits: int, options: dict[str, Any]) -> None:
    figures = bart(bits, **options).figures
    assert figures["max_logit_error"] <= figures["limit"]
    assert figures["positions"] > 100
    if bits:
        layers = options.get("layers", 2)
        assert figures["products"] == layers * (4 + 2) + options.get("decoder_layers", layers) * (8 + 2) + 1


@pytest.mark.slow
@pytest.mark.parametrize("bits", [0, 8, 4, 2])
@pytest.mark.parametrize(
    "options",
    [
        {"layers": 1, "heads": 1},
        {"layers": 1, "decoder_layers": 2, "heads": 4, "decoder_heads": 2, "scale_embedding": True},
        {"layers": 2, "decoder_layers": 1, "heads": 1, "decoder_heads": 4, "tie": False},
        {"family": "mbart", "layers": 1, "decoder_layers": 2, "scale_embedding": True},
    ],
    ids=str,
)
def test_four_padded_rows_of_the_whole_context_are_those_of_torch(
    bart: Callable[..., Any], bits: int, options: dict[str, Any]
) -> None:
    """States of the encoder and logits of the decoder; packed ones with float inputs, where nothing rounds."""
    found = bart(bits, positions=16, quantization={"float_inputs": True} if bits else None, **options)
    chance = np.random.default_rng(0)
    ids, target = chance.integers(3, 67, (4, 16)), chance.integers(3, 67, (4, 16))
    mask = (np.arange(16) < np.array([16, 1, 9, 15])[:, None]).astype(np.int64)
    tensors = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": target}
    with torch.no_grad():
        expected = found.model(**{name: torch.from_numpy(value) for name, value in tensors.items()})
    answer = Runtime.open(found.directory, threads=1).answer(ids, mask)
    for ours, theirs in ((answer._states, expected.encoder_last_hidden_state), (answer.feed(target), expected.logits)):
        real = mask == 1 if ours is answer._states else np.ones_like(mask, dtype=bool)
        np.testing.assert_allclose(ours[real], theirs.numpy()[real], atol=1e-4 * float(np.ptp(theirs.numpy())))


@pytest.mark.slow
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_other_widths(bart: Callable[..., Any], bits: int) -> None:
    figures = bart(bits, hidden=48)
    assert figures.figures["max_product_error"] <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("hidden", [32, 40])
@pytest.mark.parametrize("quantization", [GROUPS, {"store": FLOAT16}, {**GROUPS, "store": FLOAT16}], ids=str)
def test_every_granularity_and_type(
    bart: Callable[..., Any], bits: int, hidden: int, quantization: dict[str, Any]
) -> None:
    figures = bart(bits, hidden=hidden, layers=1, quantization=quantization).figures
    assert figures["max_product_error"] <= 1e-5
    assert figures["max_float_logit_error"] <= figures["float_limit"]


@pytest.mark.slow
@pytest.mark.parametrize("quantization", [GROUPS, {"store": FLOAT16}, {**GROUPS, "store": FLOAT16}], ids=str)
def test_scales_and_positions_are_stored_once(
    bart: Callable[..., Any], tiny_bart: Callable[..., Any], quantization: dict[str, Any]
) -> None:
    model = tiny_bart(vocab=2100, layers=1)
    numbers = sum(tensor.numel() for tensor in stock_tensors(model))
    found = bart(2, model=model, quantization=quantization)
    size = sum(file.stat().st_size for file in found.directory.glob("*.onnx*"))
    expected = packed_bytes(found.packed.spec, numbers)
    scales = found.packed.tensors["model.shared.scale"].nbytes
    if "store" in quantization:
        assert scales == 2 * 2100
        assert expected == packed_bytes(found.packed.spec.model_copy(update={"half": {}}), numbers) - 2 * 2 * 66 * 32
    assert expected <= size <= expected + GRAPHS_BYTES
    shared = 2100 * 32 // 4 + scales
    assert shared <= (found.directory / SHARED_FILE).stat().st_size <= shared + 128


def test_unequal_heads_and_ffn_export(bart: Callable[..., Any], tiny_bart: Callable[..., Any]) -> None:
    model = tiny_bart()
    keep = {"encoder.layer.0.heads": [1, 3], "decoder.layer.1.cross_heads": [2], "decoder.layer.0.ffn": [1, 4, 5]}
    cut(model, family_of(model.config), {axis: torch.tensor(units) for axis, units in keep.items()})
    decoder = graph_of(bart(model=model), DECODER_FILE)
    assert [shape_of(value)[1] for value in decoder.input[3::2]] == [4, 4, 4, 1]


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "tie"), [(0, True), (0, False), (2, True), (2, False)])
def test_weights_are_stored_once(bart: Callable[..., Any], tiny_bart: Callable[..., Any], bits: int, tie: bool) -> None:
    model = tiny_bart(tie=tie, vocab=1200)
    with torch.no_grad():
        model.final_logits_bias.zero_()
    sides: Any = [model.model.encoder.embed_tokens, model.model.decoder.embed_tokens]
    shares = sides[0].weight is sides[1].weight  # if not, as in transformers 5 untied, the common table is of no use
    numbers = sum(tensor.numel() for tensor in stock_tensors(model)) - 1200
    found = bart(bits, model=model)
    size = sum(file.stat().st_size for file in found.directory.glob("*.onnx*"))
    embedding = 1200 * 32 // 4 + 4 * 1200 if bits else 4 * 1200 * 32
    expected = packed_bytes(found.packed.spec, numbers) if bits else 4 * numbers
    expected -= 0 if shares else embedding
    assert expected - 4 * 1200 <= size <= expected + GRAPHS_BYTES
    if shares:
        assert embedding <= (found.directory / SHARED_FILE).stat().st_size <= embedding + 128
    else:
        assert not (found.directory / SHARED_FILE).exists()


def test_padding_of_the_source_changes_nothing(bart: Callable[..., Any]) -> None:
    runtime = Runtime.open(bart().directory)
    ids = np.random.default_rng(0).integers(3, 67, (1, 6))
    padded = np.concatenate([ids, np.full((1, 4), 9)], axis=1)
    mask = np.array([[1] * 6 + [0] * 4])
    target = np.array([[2, 5, 7]])
    np.testing.assert_allclose(runtime.answer(padded, mask).feed(target), runtime.answer(ids).feed(target), atol=1e-5)


def test_later_steps_read_the_cache_alone(bart: Callable[..., Any]) -> None:
    """Once keys and values of the source are in the cache, the encoder's states are not looked at."""
    runtime = Runtime.open(bart().directory)
    ids = np.random.default_rng(0).integers(3, 67, (2, 6))
    honest, blind = runtime.answer(ids), runtime.answer(ids)
    for decoding in (honest, blind):
        decoding.feed(np.array([[2], [2]]))
    blind._states[:] = np.nan
    step = np.array([[5], [8]])
    assert np.array_equal(honest.feed(step), blind.feed(step))


def test_rows_can_be_reordered(bart: Callable[..., Any]) -> None:
    runtime = Runtime.open(bart().directory)
    ids = np.random.default_rng(0).integers(3, 67, (2, 6))
    rows = np.array([1, 1, 0])
    moved, straight = runtime.answer(ids), runtime.answer(ids[rows])
    first = np.array([[2, 4], [2, 9]])
    moved.feed(first)
    moved.reorder(rows)
    straight.feed(first[rows])
    step = np.array([[5], [8], [6]])
    np.testing.assert_allclose(moved.feed(step), straight.feed(step), atol=1e-5)


def test_an_mbart_normalizes_embeddings_and_states(bart: Callable[..., Any]) -> None:
    """The embeddings go through two normalizations: one of their own, whose output is the stream, and the block's."""
    found = bart(family="mbart")
    for file, blocks in ((ENCODER_FILE, 4), (DECODER_FILE, 6)):
        counts = Counter(node.op_type for node in graph_of(found, file).node)
        assert counts["LayerNormalization"] == 1
        assert counts["SkipLayerNormalization"] == 1 + blocks


def forget_embedding_norm(graph: onnx.GraphProto, found: Any) -> None:
    """The stream holds the embeddings as they are."""
    first, second = [node for node in graph.node if node.op_type == "SkipLayerNormalization"][:2]
    first.output[3] = "embeddings"
    second.input[list(second.input).index(first.output[0])] = "embeddings"


def forget_final_norm(graph: onnx.GraphProto, found: Any) -> None:
    """The head reads the sum that the last normalization takes."""
    head = next(node for node in graph.node if node.name == "lm_head")
    norm = next(node for node in graph.node if head.input[0] in node.output)
    head.input[0] = norm.output[3]


@pytest.mark.parametrize("mutate", [forget_embedding_norm, forget_final_norm])
def test_a_wrong_mbart_fails(bart: Callable[..., Any], mutate: Callable[..., None]) -> None:
    found = bart(family="mbart")
    model = onnx.load(found.directory / DECODER_FILE)
    mutate(model.graph, found)
    onnx.save(model, found.directory / DECODER_FILE)
    with pytest.raises(ParityError, match="logits differ from torch"):
        check_parity(found.model, found.directory)


def swap_norms(graph: onnx.GraphProto, found: Any) -> None:
    nodes = {node.name: node for node in graph.node}
    first, second = (nodes[f"model.decoder.layers.0.{name}"] for name in ("self_attn_layer_norm", "final_layer_norm"))
    first.input[2], second.input[2] = second.input[2], first.input[2]


def forget_mask(graph: onnx.GraphProto, found: Any) -> None:
    for node in nodes_of(graph):
        if node.op_type == "MultiHeadAttention":
            del node.input[4:]


def reuse_key_as_value(graph: onnx.GraphProto, found: Any) -> None:
    node = next(each for each in nodes_of(graph) if each.op_type == "MultiHeadAttention")
    node.input[2] = node.input[1]


@pytest.mark.parametrize("mutate", [swap_norms, forget_mask, reuse_key_as_value])
def test_a_wrong_decoder_fails(bart: Callable[..., Any], mutate: Callable[..., None]) -> None:
    found = bart()
    model = onnx.load(found.directory / DECODER_FILE)
    mutate(model.graph, found)
    onnx.save(model, found.directory / DECODER_FILE)
    with pytest.raises(ParityError, match=rf"{ENCODER_FILE}, {DECODER_FILE}: logits differ from torch"):
        check_parity(found.model, found.directory)
