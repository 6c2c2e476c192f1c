"""The gate lets honest graphs pass and stops every wrong one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from compress.errors import ParityError
from compress.functional.fake_quant import activation_block
from compress.onnx.export.parity.cases import cases_of
from compress.onnx.export.parity.check import check_parity
from compress.onnx.export.parity.products import product_inputs
from compress.onnx.runtime import Runtime
from compress.surgery.quantization import Product

MODULE = "transformer.h.1.mlp.c_fc"


def node(graph: onnx.ModelProto, name: str) -> onnx.NodeProto:
    (found,) = [each for each in graph.graph.node if each.name == name]
    return found


def constant(graph: onnx.ModelProto, name: str, value: Any) -> str:
    graph.graph.initializer.append(numpy_helper.from_array(value, name))
    return name


def set_attribute(product: onnx.NodeProto, name: str, value: int) -> None:
    (attribute,) = [each for each in product.attribute if each.name == name]
    attribute.i = value


def put_before(graph: onnx.ModelProto, name: str, *nodes: onnx.NodeProto) -> None:
    at = [each.name for each in graph.graph.node].index(name)
    for each in reversed(nodes):
        graph.graph.node.insert(at, each)


def wrong_zero_point(graph: onnx.ModelProto) -> None:
    """One less than the default, for every block."""
    product = node(graph, MODULE)
    rows, blocks = next(t.dims[:2] for t in graph.graph.initializer if t.name == f"{MODULE}.codes")
    while len(product.input) < 4:
        product.input.append("")
    product.input[3] = constant(graph, "zero", np.full((rows, blocks), 7, np.float32))


def shifted_scale(graph: onnx.ModelProto) -> None:
    """Each block gets the scale of the block before it."""
    product = node(graph, "lm_head")
    (scales,) = [numpy_helper.to_array(t) for t in graph.graph.initializer if t.name == "transformer.wte.scales"]
    blocks = next(t.dims[1] for t in graph.graph.initializer if t.name == "transformer.wte.codes")
    expanded = np.repeat(scales, blocks, axis=1)
    product.input[2] = constant(graph, "shifted", np.roll(expanded.ravel(), 1).reshape(expanded.shape))


def dropped_bias(graph: onnx.ModelProto) -> None:
    product = node(graph, MODULE)
    del product.input[3:]


def float_inputs(graph: onnx.ModelProto) -> None:
    """The kernel does not quantize the product's inputs."""
    set_attribute(node(graph, MODULE), "accuracy_level", 0)


def smaller_blocks(graph: onnx.ModelProto) -> None:
    """The same weights, but two scales of inputs where torch has one."""
    product = node(graph, MODULE)
    (codes,) = [numpy_helper.to_array(t) for t in graph.graph.initializer if t.name == product.input[1]]
    (filled,) = [each for each in graph.graph.node if product.input[2] in each.output]
    rows, _, packed = codes.shape
    product.input[1] = constant(graph, "halves", codes.reshape(rows, -1, packed // 2))
    scale = numpy_helper.to_array(filled.attribute[0].t)
    product.input[2] = constant(graph, "scale", np.full((rows, 2 * codes.shape[1]), scale[0]))
    set_attribute(product, "block_size", packed)  # 4 bits: two codes a byte


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mutate", "where"),
    [
        (wrong_zero_point, MODULE),
        (shifted_scale, "lm_head"),
        (dropped_bias, MODULE),
        (float_inputs, MODULE),
        (smaller_blocks, MODULE),
    ],
)
def test_a_wrong_product_fails(exported: Callable[..., Any], mutate: Callable[[Any], None], where: str) -> None:
    found = exported(4, hidden=64)
    graph = found.graph
    mutate(graph)
    onnx.save(graph, found.directory / "model.onnx")
    with pytest.raises(ParityError, match=rf"model.onnx: {where} differs relatively from torch by .*, limit 1e-05"):
        check_parity(found.model, found.directory, found.packed.spec)


@pytest.mark.slow
def test_an_outlier_that_weights_of_zero_meet_is_no_reason(
    exported: Callable[..., Any], tiny_bart: Callable[..., Any]
) -> None:
    """A kernel rounds code + zero point: of an outlier on zeros that is all it leaves, much beside a small product."""
    figures = exported(2, model=tiny_bart(hidden=2, heads=2, ffn=2, layers=1, seed=29)).figures
    assert figures["max_product_error"] <= 2e-6


@pytest.fixture
def silent(exported: Callable[..., Any], tiny_gpt2: Callable[..., Any]) -> Callable[..., Any]:
    """A function that exports a model with one product of zeros, by a quantizer; ``lsq`` gives it a scale above 0."""

    def make(method: str) -> Any:
        model = tiny_gpt2(hidden=64)
        for parameter in model.get_submodule(MODULE).parameters():
            torch.nn.init.zeros_(parameter)
        return exported(4, model=model, quantization={"method": method})

    return make


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dynamic_scaling", "lsq"])
def test_a_product_of_zeros_passes(silent: Callable[..., Any], method: str) -> None:
    assert silent(method).figures["max_product_error"] <= 2e-6


def tiny_bias(graph: onnx.ModelProto) -> None:
    (bias,) = [each for each in graph.graph.initializer if each.name == f"{MODULE}.bias"]
    bias.CopyFrom(numpy_helper.from_array(np.full(256, 1e-9, np.float32), bias.name))


def other_code(graph: onnx.ModelProto) -> None:
    (codes,) = [each for each in graph.graph.initializer if each.name == f"{MODULE}.codes"]
    values = numpy_helper.to_array(codes).copy()
    values[3, 0, 5] ^= 1
    codes.CopyFrom(numpy_helper.from_array(values, codes.name))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "mutate", "error"),
    [("dynamic_scaling", tiny_bias, "inf"), ("lsq", wrong_zero_point, "0\\."), ("lsq", other_code, "0\\.")],
)
def test_a_wrong_product_of_zeros_fails(
    silent: Callable[..., Any], method: str, mutate: Callable[[Any], None], error: str
) -> None:
    found = silent(method)
    graph = found.graph
    mutate(graph)
    onnx.save(graph, found.directory / "model.onnx")
    with pytest.raises(ParityError, match=rf"{MODULE} differs relatively from torch by {error}"):
        check_parity(found.model, found.directory, found.packed.spec)


@pytest.mark.slow
def test_asymmetric_activations_fail(exported: Callable[..., Any]) -> None:
    found = exported(4, hidden=64)
    for module in found.model.modules():
        if isinstance(module, Product):
            module.spec = module.spec.model_copy(update={"activations": "asymmetric"})
    with pytest.raises(ParityError, match="differs relatively"):
        check_parity(found.model, found.directory, found.packed.spec)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("level", "message"),
    [
        (1, f"{MODULE} differs relatively from torch"),
        (4, "logits with float inputs of linear layers differ from torch"),
    ],
    ids=["in place of the kernel's", "before the kernel's"],
)
def test_asymmetric_activations_of_a_node_fail(exported: Callable[..., Any], level: int, message: str) -> None:
    """Rounded to 8 bits for the whole tensor, with a zero point; behind that the first test alone is blind."""
    found = exported(4, hidden=64)
    graph = found.graph
    product = node(graph, MODULE)
    parts = [f"rounded.{part}" for part in ("codes", "scale", "zero")]
    rounding = helper.make_node("DynamicQuantizeLinear", product.input[:1], parts)
    product.input[0] = "rounded"
    set_attribute(product, "accuracy_level", level)
    put_before(graph, MODULE, rounding, helper.make_node("DequantizeLinear", parts, ["rounded"]))
    onnx.save(graph, found.directory / "model.onnx")
    with pytest.raises(ParityError, match=message):
        check_parity(found.model, found.directory, found.packed.spec)


@pytest.mark.slow
def test_only_the_graph_as_it_is_shows_inputs_that_8_bits_cannot_hold(exported: Callable[..., Any]) -> None:
    """A constant goes into one channel before a product and comes off behind it: exact for each product and in float32.

    But the kernel's scales then follow that channel, and the others of its block are rounded away.
    """
    found = exported(4, hidden=64)
    graph = found.graph
    module = "transformer.h.0.attn.c_attn"
    product = node(graph, module)
    (x,), (y,) = product.input[:1], product.output
    shift = np.zeros(64, np.float32)
    shift[0] = 300
    added = found.model.get_submodule(module).weight.detach().numpy() @ shift
    before = helper.make_node("Add", [x, constant(graph, "shift", shift)], ["shifted"])
    behind = helper.make_node("Sub", ["moved", constant(graph, "added", added)], [y])
    product.input[0], product.output[0] = "shifted", "moved"
    put_before(graph, module, before)
    put_before(graph, "transformer.h.0.attn.c_proj.input", behind)
    onnx.save(graph, found.directory / "model.onnx")
    with pytest.raises(ParityError, match=r"model\.onnx: logits differ from torch by"):
        check_parity(found.model, found.directory, found.packed.spec)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [0, 4])
def test_wrong_wiring_fails(exported: Callable[..., Any], bits: int) -> None:
    """Every product is right, but two normalizations have changed places."""
    found = exported(bits)
    graph = found.graph
    first, second = node(graph, "transformer.h.0.ln_2"), node(graph, "transformer.h.1.ln_1")
    first.input[2], second.input[2] = second.input[2], first.input[2]
    onnx.save(graph, found.directory / "model.onnx")
    with pytest.raises(ParityError, match="logits"):
        check_parity(found.model, found.directory, found.packed.spec if bits else None)


def swap_inputs(node: onnx.NodeProto, first: int, second: int) -> None:
    node.input[first], node.input[second] = node.input[second], node.input[first]


def swap_cosines_and_sines(graph: onnx.ModelProto) -> None:
    for each in graph.graph.node:
        if each.op_type == "RotaryEmbedding":
            swap_inputs(each, 2, 3)


def rotate_neighbouring_channels(graph: onnx.ModelProto) -> None:
    """Pairs of neighbours in place of pairs from both halves."""
    for each in graph.graph.node:
        if each.op_type == "RotaryEmbedding":
            each.attribute.append(helper.make_attribute("interleaved", 1))


def rotate_by_place(graph: onnx.ModelProto) -> None:
    """Padding counts as positions in the first call, and does not count later."""
    spread = [
        helper.make_node("Shape", ["input_ids"], ["new"], start=1, end=2),
        helper.make_node("Squeeze", ["new"], ["new.number"]),
        helper.make_node(
            "Range",
            [constant(graph, "from", np.array(0)), "new.number", constant(graph, "by", np.array(1))],
            ["places"],
        ),
        helper.make_node("Shape", ["input_ids"], ["ids.shape"]),
        helper.make_node("Shape", ["attention_mask"], ["mask.shape"]),
        helper.make_node("Expand", ["places", "ids.shape"], ["prompt.places"]),
        helper.make_node("Equal", ["ids.shape", "mask.shape"], ["same"]),
        helper.make_node("Cast", ["same"], ["same.int"], to=6),
        helper.make_node("ReduceMin", ["same.int"], ["whole.int"], keepdims=0),
        helper.make_node("Cast", ["whole.int"], ["whole"], to=9),
        helper.make_node("Where", ["whole", "prompt.places", "position_ids"], ["places.used"]),
    ]
    for each in graph.graph.node:
        if each.op_type == "RotaryEmbedding":
            each.input[1] = "places.used"
    for each in reversed(spread):
        graph.graph.node.insert(0, each)


def keep_keys_as_they_are(graph: onnx.ModelProto) -> None:
    for each in graph.graph.node:
        if each.op_type == "GroupQueryAttention":
            each.input[1] = each.input[1].removesuffix(".rotated")


def other_head_order(graph: onnx.ModelProto) -> None:
    """Query head h reads key/value head h modulo their number, in place of h divided by the group's size."""
    for name in [each.name for each in graph.graph.node if each.op_type == "GroupQueryAttention"]:
        attention = node(graph, name)
        order = np.arange(32).reshape(2, 2, 8).swapaxes(0, 1).ravel()
        turned = helper.make_node(
            "Gather", [attention.input[0], constant(graph, f"{name}.order", order)], [f"{name}.turned"], axis=-1
        )
        attention.input[0] = f"{name}.turned"
        put_before(graph, name, turned)


def swap_gate_and_up(graph: onnx.ModelProto) -> None:
    for each in graph.graph.node:
        if each.op_type == "Split" and "gate_proj" in each.name:
            each.output[0], each.output[1] = each.output[1], each.output[0]


def wrong_epsilon(graph: onnx.ModelProto) -> None:
    for each in graph.graph.node:
        for attribute in each.attribute:
            if attribute.name == "epsilon":
                attribute.f = 1e-3


def centre_the_norm(graph: onnx.ModelProto) -> None:
    for each in graph.graph.node:
        each.op_type = each.op_type.replace("Simplified", "")


LLAMA_MUTATIONS = [
    *(swap_cosines_and_sines, rotate_neighbouring_channels, rotate_by_place, keep_keys_as_they_are),
    *(other_head_order, swap_gate_and_up, wrong_epsilon, centre_the_norm),
]


@pytest.mark.slow
@pytest.mark.parametrize("mutate", LLAMA_MUTATIONS)
@pytest.mark.parametrize("bits", [0, 4])
def test_a_wrong_llama_fails(exported: Callable[..., Any], bits: int, mutate: Callable[[Any], None]) -> None:
    found = exported(bits, family="llama")
    graph = found.graph
    before = graph.SerializeToString()
    mutate(graph)
    assert graph.SerializeToString() != before
    onnx.save(graph, found.directory / "model.onnx")
    with pytest.raises(ParityError, match="logits"):
        check_parity(found.model, found.directory, found.packed.spec if bits else None)


def test_padding_that_is_not_hidden_fails(exported: Callable[..., Any]) -> None:
    found = exported()
    graph = found.graph
    for tensor in graph.graph.initializer:
        if tensor.name == "scalar_-1000000000.0":
            tensor.CopyFrom(numpy_helper.from_array(np.array(0, np.float32), tensor.name))
    onnx.save(graph, found.directory / "model.onnx")
    with pytest.raises(ParityError, match="logits differ"):
        check_parity(found.model, found.directory)


@pytest.mark.slow
def test_padding_that_breeds_nan_fails(exported: Callable[..., Any]) -> None:
    """Rows without padding stay right, so that the NaN is in some comparisons only."""
    found = exported()
    graph = found.graph
    for tensor in graph.graph.initializer:
        if tensor.name == "scalar_-1000000000.0":
            tensor.CopyFrom(numpy_helper.from_array(np.array(np.nan, np.float32), tensor.name))
    onnx.save(graph, found.directory / "model.onnx")
    with pytest.raises(ParityError, match="logits differ from torch by nan"):
        check_parity(found.model, found.directory)


@pytest.mark.slow
def test_a_product_that_is_not_packed_fails(exported: Callable[..., Any], tiny_gpt2: Callable[..., Any]) -> None:
    from .conftest import packed_model

    found = exported()
    model, packed = packed_model(tiny_gpt2(), 4)
    with pytest.raises(ParityError, match=r"has no packed linear layer for transformer\.h\.0\.attn\.c_attn"):
        check_parity(model, found.directory, packed.spec)


@pytest.mark.slow
def test_a_packed_product_that_torch_does_not_have_fails(exported: Callable[..., Any]) -> None:
    """One with the identity rounds the residual stream to 8 bits, and gives the same in float32."""
    found = exported(4, hidden=64)
    graph = found.graph
    stream = "transformer.h.0.ln_2.sum"
    reader = node(graph, "transformer.h.1.ln_1")
    reader.input[list(reader.input).index(stream)] = "rounded"
    ones = np.eye(64, dtype=np.uint8) + 8  # 8 is zero
    codes = constant(graph, "identity.codes", (ones[:, ::2] | ones[:, 1::2] << 4).reshape(64, 1, 32))
    inputs = [stream, codes, constant(graph, "identity.scales", np.ones((64, 1), np.float32))]
    sizes = {"bits": 4, "block_size": 64, "K": 64, "N": 64}
    product = helper.make_node(
        "MatMulNBits", inputs, ["rounded"], name="identity", domain="com.microsoft", accuracy_level=4, **sizes
    )
    put_before(graph, "transformer.h.1.ln_1", product)
    onnx.save(graph, found.directory / "model.onnx")
    with pytest.raises(
        ParityError, match=r"model\.onnx: has a packed linear layer that the torch model does not have: identity"
    ):
        check_parity(found.model, found.directory, found.packed.spec)


@pytest.mark.slow
def test_text_that_torch_would_not_write_fails(exported: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    found = exported()
    honest = Runtime.generate

    def wrong_at_third(self: Runtime, *prompts: Any, **options: Any) -> Any:
        text = honest(self, *prompts, **options)
        text[0, prompts[0].shape[1] + 2] += 1
        return text % 67

    monkeypatch.setattr(Runtime, "generate", wrong_at_third)
    with pytest.raises(ParityError, match="greedy text differs from torch at new token 3"):
        check_parity(found.model, found.directory)


@pytest.mark.slow
def test_figures_say_what_was_compared(exported: Callable[..., Any]) -> None:
    figures = exported(2).figures
    assert figures["positions"] > 100
    assert figures["greedy_tokens"] == 32
    assert 0 <= figures["greedy_undecided"] <= 32
    assert 0 < figures["max_logit_error"] <= figures["limit"] < figures["logit_range"]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 200), st.sampled_from([32, 64, 128]), st.integers(0, 2**32 - 1))
def test_product_inputs_round_the_same_whatever_the_last_bit(columns: int, block: int, seed: int) -> None:
    x = torch.from_numpy(product_inputs(columns, block, np.random.default_rng(seed)))
    moved = x * (1 + 1e-6 * torch.randn_like(x))
    difference = (activation_block(x, block=block) - activation_block(moved, block=block)).abs().max()
    assert difference <= 1e-5 * x.abs().max()
    assert x.abs().max() == pytest.approx(50)


SMALL = [(1, 67), (2, 67), (3, 67), (24, 1), (1, 1)]
"""Positions and vocabulary."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("graph", "context", "vocab"), [*(("decoding", *sizes) for sizes in SMALL), ("plain", 2, 67), ("plain", 1, 1)]
)
def test_small_models_are_compared_too(exported: Callable[..., Any], graph: str, context: int, vocab: int) -> None:
    found = exported(graph=graph, positions=context, vocab=vocab)
    assert found.figures["max_logit_error"] <= found.figures["limit"]
    assert found.figures["greedy_tokens"] == (0 if 1 in (context, vocab) else 2 * (context - 1))
    runtime = Runtime.open(found.directory)
    ids = np.arange(context)[None] % vocab
    with torch.no_grad():
        expected = found.model(torch.from_numpy(ids)).logits
    torch.testing.assert_close(torch.from_numpy(runtime.logits(ids)), expected)


@pytest.mark.slow
@pytest.mark.parametrize(("context", "vocab"), SMALL)
def test_small_packed_models_are_compared_too(exported: Callable[..., Any], context: int, vocab: int) -> None:
    figures = exported(4, positions=context, vocab=vocab).figures
    assert figures["products"] > 0
    assert figures["max_float_logit_error"] <= figures["float_limit"]


@pytest.mark.parametrize("context", [1, 2, 3, 24])
def test_pieces_fill_the_context_and_no_more(context: int) -> None:
    cases = list(cases_of(67, context, np.random.default_rng(0)))
    for case in cases:
        assert case.ids.shape == case.mask.shape
        assert sum(case.pieces) == case.ids.shape[1] <= context and min(case.pieces) > 0
        assert case.mask.any(axis=1).all()
    assert max(case.ids.shape[1] for case in cases) == context
    assert {len(case.pieces) > 1 for case in cases} == {False} | {context > 1}


@pytest.mark.parametrize("context", [1, 2])
def test_wrong_wiring_of_a_small_model_fails(exported: Callable[..., Any], context: int) -> None:
    found = exported(positions=context)
    graph = found.graph
    first, second = node(graph, "transformer.h.0.ln_2"), node(graph, "transformer.h.1.ln_1")
    first.input[2], second.input[2] = second.input[2], first.input[2]
    onnx.save(graph, found.directory / "model.onnx")
    with pytest.raises(ParityError, match="logits differ"):
        check_parity(found.model, found.directory)
