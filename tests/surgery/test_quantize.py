"""Laws: what is packed computes what was trained, bit for bit; tied stays tied; bytes are what the papers count."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import BartConfig, GPT2Config

from compress.errors import ModelError
from compress.functional import fake_quant as fq
from compress.functional.blocks import dequantize_blocks
from compress.models import family_of
from compress.models.loading import build
from compress.models.structure import sized_axes, stock_tensors
from compress.surgery.cut import cut
from compress.surgery.quantization import (
    MatrixSpec,
    Product,
    Quantization,
    Table,
    fake_quantized,
    histograms,
    mean_cosine,
    packed_bytes,
    packed_state,
    plan,
    prepared,
    quantize,
    quantizer_parameters,
    restore,
    unpacked,
)
from compress.surgery.quantization.modules import FakeQuantWeight
from compress.surgery.quantization.spec import block_size

METHODS = ("dynamic_scaling", "pact", "lsq", "laq", "twn", "round_to_nearest")
MB = 2**20


def settings_of(bits: int = 4, **changes: Any) -> Quantization:
    weights = {"bits": bits, **changes.pop("weights", {})}
    embedding = {"bits": bits, **changes.pop("embedding", {})}
    return Quantization.model_validate({"weights": weights, "embedding": embedding, **changes})


def quantized(model: Any, config: Quantization) -> Any:
    model = copy.deepcopy(model)
    quantize(model, family_of(model.config), config)
    return model


def restored(model: Any, *, dequantize: bool = False) -> Any:
    state, spec = packed_state(model)
    fresh = build(model.config)
    restore(fresh, family_of(model.config), spec, state, dequantize=dequantize)
    return fresh


def logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**inputs).logits
    return found


@pytest.fixture(params=["gpt2", "bart", "mbart", "llama"])
def tiny(request: pytest.FixtureRequest) -> Callable[..., Any]:
    factory: Callable[..., Any] = request.getfixturevalue(f"tiny_{request.param}")
    return factory


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_packed_model_computes_what_was_trained(tiny: Any, tiny_inputs: Any, bits: int, tie: bool) -> None:
    model = quantized(tiny(hidden=40, ffn=72, tie=tie), settings_of(bits))
    inputs = tiny_inputs(model)
    ours = logits(model, inputs)
    assert torch.equal(ours, logits(restored(model), inputs))
    with prepared(model):
        assert torch.equal(ours, logits(model, inputs))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("granularity", ["tensor", "row", "group"])
def test_every_method_is_packed_exactly(tiny: Any, tiny_inputs: Any, method: str, granularity: str) -> None:
    config = settings_of(
        2, weights={"method": method, "granularity": granularity}, embedding={"granularity": granularity}
    )
    model = quantized(tiny(layers=1, hidden=40), config)
    inputs = tiny_inputs(model)
    assert torch.equal(logits(model, inputs), logits(restored(model), inputs))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("hidden", [24, 64, 160])  # less than a block, one, one and a short one
def test_a_scale_a_row_and_block(tiny: Any, tiny_inputs: Any, bits: int, hidden: int) -> None:
    group = {"granularity": "group"}
    model = quantized(tiny(layers=1, hidden=hidden, ffn=72), settings_of(bits, weights=group, embedding=group))
    inputs = tiny_inputs(model)
    assert torch.equal(logits(model, inputs), logits(restored(model), inputs))
    state, spec = packed_state(model)
    for matrix in spec.stored:
        rows, blocks, _ = matrix.packed_shape
        assert (
            state[f"{matrix.module}.scale"].shape
            == (rows, blocks)
            == model.get_submodule(matrix.module).quantizer.scale.shape
        )
    elements = sum(tensor.numel() for tensor in stock_tensors(build(model.config)))
    assert packed_bytes(spec, elements) == sum(tensor.nbytes for tensor in state.values())


@pytest.mark.parametrize(
    "activations",
    [
        None,
        {"granularity": "tensor"},
        {"granularity": "tensor", "symmetric": True},
        {"granularity": "tensor", "symmetric": False, "clip": 0.5},
    ],
)
def test_activations_are_restored_exactly(tiny: Any, tiny_inputs: Any, activations: Any) -> None:
    model = quantized(tiny(), settings_of(activations=activations))
    inputs = tiny_inputs(model)
    assert torch.equal(logits(model, inputs), logits(restored(model), inputs))


@pytest.mark.parametrize("width", [640, 512, 384, 192])
def test_pruned_widths(tiny_gpt2: Any, tiny_inputs: Any, width: int) -> None:
    model = quantized(tiny_gpt2(layers=1, hidden=width, ffn=width), settings_of(2, weights={"init": "one"}))
    inputs = tiny_inputs(model)
    assert torch.equal(logits(model, inputs), logits(restored(model), inputs))
    blocks = {matrix.block for matrix in packed_state(model)[1].matrices}
    assert blocks == {64 if width == 192 else 128}


def test_scaled_bart_embeddings(tiny_bart: Any, tiny_inputs: Any) -> None:
    stock = tiny_bart(scale_embedding=True)
    inputs = tiny_inputs(stock)
    exact = logits(stock, inputs)
    model = quantized(stock, settings_of(8, activations=None))
    torch.testing.assert_close(logits(model, inputs), exact, rtol=0.05, atol=0.05 * float(exact.std()))
    assert torch.equal(logits(model, inputs), logits(restored(model), inputs))


def test_unevenly_cut_model(tiny: Any, tiny_inputs: Any) -> None:
    model, fresh = tiny(seed=0), tiny(seed=1)
    family = family_of(model.config)
    axes = sized_axes(model, family)
    held = {axis.holds for axis in axes}  # query heads go with their groups
    cuttable = [axis for axis in axes if axis.kind != "hidden" and axis.name not in held]
    keep = {axis.name: torch.arange(max(1, axis.size - 1 - n % 2)) for n, axis in enumerate(cuttable)}
    keep["hidden"] = torch.arange(24)
    cut(model, family, keep)
    cut(fresh, family, keep)
    quantize(model, family, settings_of(2))
    state, spec = packed_state(model)
    restore(fresh, family, spec, state, dequantize=False)
    inputs = tiny_inputs(model)
    assert torch.equal(logits(model, inputs), logits(fresh, inputs))


def test_dequantized_model_is_stock(tiny: Any, tiny_inputs: Any) -> None:
    model = quantized(tiny(hidden=40, tie=True), settings_of(2, activations=None))
    plain = restored(model, dequantize=True)
    inputs = tiny_inputs(model)
    assert {type(module) for module in plain.modules()} == {type(module) for module in build(model.config).modules()}
    torch.testing.assert_close(logits(plain, inputs), logits(model, inputs), rtol=1e-4, atol=1e-4)
    head = plain.get_submodule(family_of(model.config).head)
    assert head.weight is plain.get_input_embeddings().weight
    assert head.weight[0].unique().numel() <= 3


def test_generates_with_a_cache(tiny: Any, tiny_inputs: Any) -> None:
    model = quantized(tiny(), settings_of(4))
    inputs = {name: value for name, value in tiny_inputs(model).items() if not name.startswith("decoder")}
    model.generation_config.pad_token_id = 1
    options = {"max_new_tokens": 5, "do_sample": False}
    deployed = restored(model)
    deployed.generation_config = model.generation_config
    assert torch.equal(model.generate(**inputs, **options), deployed.generate(**inputs, **options))


@pytest.mark.parametrize(
    ("config", "mb"),
    [
        (GPT2Config(), {32: 474.70, 8: 121.27, 4: 62.37, 2: 32.92}),
        (
            BartConfig(
                d_model=768, encoder_layers=6, decoder_layers=6, encoder_ffn_dim=3072, decoder_ffn_dim=3072,
                encoder_attention_heads=12, decoder_attention_heads=12,
            ),
            {32: 532.04, 8: 138.09, 4: 72.44, 2: 39.61},
        ),
    ],
    ids=["gpt2-small", "bart-base"],
)  # fmt: skip
def test_bytes_are_the_published_ones(config: Any, mb: dict[int, float]) -> None:
    with torch.device("meta"):
        model = build(config)
    elements = sum(tensor.numel() for tensor in stock_tensors(model))
    assert round(4 * elements / MB, 2) == mb[32]
    for bits in (8, 4, 2):
        spec = plan(model, family_of(config), settings_of(bits))
        assert round(packed_bytes(spec, elements, scales=False) / MB, 2) == mb[bits]
        scales = packed_bytes(spec, elements) - packed_bytes(spec, elements, scales=False)
        assert scales == 4 * (config.vocab_size + len(spec.stored) - 1)


def test_coverage_counts_what_is_stored(tiny: Any) -> None:
    model = tiny(hidden=40)
    expected = plan(model, family_of(model.config), settings_of(2))
    before = sum(parameter.numel() for parameter in model.parameters())
    coverage = quantize(model, family_of(model.config), settings_of(2))
    state, spec = packed_state(model)
    assert {matrix.module: matrix for matrix in spec.matrices} == {each.module: each for each in expected.matrices}
    assert coverage.modules_touched == len(spec.matrices) < coverage.modules_total
    assert coverage.parameters_total == before
    assert coverage.bytes_after == sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    floats = {name for name in state if not name.endswith((".codes", ".scale"))}
    assert all(
        "ln" in name or "norm" in name or "bias" in name or "wpe" in name or "positions" in name for name in floats
    )


def test_no_activations_are_asymmetric_after_a_gate(tiny_llama: Any) -> None:
    """A gate multiplies by values of both signs."""
    model = quantized(tiny_llama(), settings_of(activations={"granularity": "tensor"}))
    found = {name: module.spec.activations for name, module in model.named_modules() if isinstance(module, Product)}
    assert len(found) == 7 * 2 + 1
    assert set(found.values()) == {"symmetric"}


def test_tied_modules_share_weight_and_scale(tiny: Any) -> None:
    model = quantized(tiny(tie=True), settings_of(2))
    family = family_of(model.config)
    shared = {id(model.get_submodule(name).quantizer) for name in (*family.embeddings, family.head)}
    assert len(shared) == 1
    assert len({id(parameter) for parameter in quantizer_parameters(model)}) == len(fake_quantized(model))
    head: Any = model.get_submodule(family.head)
    assert head.quantizer.scale.shape == (model.config.vocab_size,)


def test_untied_head_has_codes_of_its_own(tiny: Any) -> None:
    model = quantized(tiny(tie=False), settings_of(2, embedding={"bits": 8}))
    state, spec = packed_state(model)
    head = family_of(model.config).head
    matrix = next(each for each in spec.matrices if each.module == head)
    assert (matrix.shares, matrix.bits, matrix.granularity) == ("", 8, "row")
    assert f"{head}.codes" in state


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize(("symmetric", "name"), [(True, "symmetric"), (False, "asymmetric")])
def test_symmetric_chooses_for_every_product(tiny: Any, symmetric: bool, name: Any, clip: float | None) -> None:
    config = {"granularity": "tensor", "symmetric": symmetric, "clip": clip}
    model = quantized(tiny(), settings_of(activations=config))
    function = {"symmetric": fq.activation_symmetric, "asymmetric": fq.activation_asymmetric}[name]
    products = [module for module in model.modules() if isinstance(module, Product)]
    assert products
    for product in products:
        x = torch.randn(3, product.spec.shape[1], generator=torch.Generator().manual_seed(0)) + 0.3
        assert torch.equal(product.activations(x), function(x, clip=clip))
        assert product.spec.activations == name
    assert all(module.spec.activations == "none" for module in model.modules() if isinstance(module, Table))


def test_symmetric_blocks_are_the_default(tiny: Any) -> None:
    model = tiny()
    said, default = (
        plan(model, family_of(model.config), settings_of(activations=config)) for config in ({"symmetric": True}, {})
    )
    assert said == default and {matrix.activations for matrix in said.matrices} == {"block", "none"}


def test_layer_wise_activations_are_asymmetric_after_the_activation_function(tiny: Any) -> None:
    model = quantized(tiny(), settings_of(activations={"granularity": "tensor"}))
    products = {name: module for name, module in model.named_modules() if isinstance(module, Product)}
    after = {name for name, module in products.items() if module.spec.activations == "asymmetric"}
    assert after == {name for name in products if name.endswith(("mlp.c_proj", "fc2"))}
    assert all(module.spec.activations == "none" for module in model.modules() if isinstance(module, Table))


def test_inputs_of_products_are_quantized(tiny_gpt2: Any) -> None:
    model = quantized(tiny_gpt2(), settings_of(4))
    product = model.transformer.h[0].mlp.c_fc
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    expected = fq.activation_block(x, block=32) @ product.quantizer().T + product.bias
    torch.testing.assert_close(product(x), expected)
    assert not torch.allclose(product(x), x @ product.quantizer().T + product.bias, atol=1e-6)


@pytest.mark.parametrize(
    ("columns", "block"), [(768, 128), (640, 128), (192, 64), (96, 32), (40, 32), (72, 32), (8, 32)]
)
def test_block_is_the_largest_that_divides(columns: int, block: int) -> None:
    assert block_size(columns) == block


def weight_of_method(
    method: str, granularity: str, seed: int, shape: tuple[int, int] = (11, 40), bits: int = 2
) -> FakeQuantWeight:
    generator = torch.Generator().manual_seed(seed)
    spec = MatrixSpec.model_validate(
        {
            "module": "m", "shape": shape, "bits": bits, "granularity": granularity, "block": 32,
            "method": method, "activations": "none",
        }
    )  # fmt: skip
    weight = FakeQuantWeight(torch.randn(shape, generator=generator), spec)
    if method == "laq":
        weight.squares.copy_(torch.rand(shape, generator=generator))
    return weight


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    method=st.sampled_from(METHODS),
    granularity=st.sampled_from(["tensor", "row", "group"]),
    shape=st.sampled_from([(1,), (1, 1), (2, 5), (33,)]),
    width=st.sampled_from([3, 40, 257]),
    seed=st.integers(0, 2**16),
)
def test_gathered_rows_are_rows_of_the_whole(
    method: str, granularity: str, shape: tuple[int, ...], width: int, seed: int
) -> None:
    weight = weight_of_method(method, granularity, seed, (11, width))
    ids = torch.randint(0, 11, shape, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(weight.rows(ids, None), weight()[ids])
    with torch.no_grad():
        codes, scale = weight.codes()
        if granularity == "group":
            assert torch.equal(dequantize_blocks(codes, scale, block=32), weight())
        else:
            assert torch.equal(fq.dequantize(codes, scale, dim=weight.spec.dim), weight())


def test_search_starts_nearer_than_one() -> None:
    spec = weight_of_method("dynamic_scaling", "tensor", 0).spec.model_copy(update={"bits": 8})
    master = torch.randn(40, 40, generator=torch.Generator().manual_seed(0))
    searched, one = FakeQuantWeight(master, spec), FakeQuantWeight(master, spec, search=False)
    assert one.scale.item() == 1
    assert (searched() - master).square().mean() < 0.01 * (one() - master).square().mean()


def test_the_norms_gradient_reaches_every_weight_and_changes_no_value(tiny_gpt2: Any) -> None:
    stock = tiny_gpt2()
    plain, carried = (quantized(stock, settings_of(2, weights={"norm_gradient": on})) for on in (False, True))
    ids = torch.randint(0, 67, (1, 9), generator=torch.Generator().manual_seed(0))
    for weight, other in zip(fake_quantized(carried), fake_quantized(plain), strict=True):
        gamma, name = weight.scale.detach(), weight.spec.module
        upstream = torch.randn(weight.weight.shape, generator=torch.Generator().manual_seed(1))
        for module, norm_gradient in ((weight, True), (other, False)):
            master = module.weight.detach().clone().requires_grad_()
            expected = fq.dynamic_scaling(master, gamma, bits=2, dim=module.spec.dim, norm_gradient=norm_gradient)
            assert torch.equal(module(), expected), name
            (wanted,) = torch.autograd.grad(expected, master, upstream)
            assert torch.equal(torch.autograd.grad(module(), module.weight, upstream)[0], wanted), name
        assert all(torch.equal(one, two) for one, two in zip(weight.codes(), other.codes(), strict=True))
    table = carried.transformer.wte.quantizer
    (gathered,) = torch.autograd.grad(table.rows(ids, None).sum(), table.weight)
    (whole,) = torch.autograd.grad(table()[ids].sum(), table.weight)
    torch.testing.assert_close(gathered, whole)
    clipped = table.weight[ids].abs() > (table.scale[ids] * table.weight[ids].abs().mean(-1)).unsqueeze(-1)
    assert clipped.any() and gathered[ids][clipped].any()


def test_settings_say_nothing_of_a_norm_that_carries_no_gradient() -> None:
    """What was made before the option came keeps its key."""
    before = {"bits": 2, "granularity": "tensor", "method": "dynamic_scaling", "init": "search"}
    assert settings_of(2).weights.model_dump(mode="json") == before
    carried = settings_of(2, weights={"norm_gradient": True}).weights
    assert carried.model_dump(mode="json") == {**before, "norm_gradient": True}
    assert type(carried).model_validate(carried.model_dump(mode="json")) == carried


def test_search_starts_each_block_nearest_to_its_weights() -> None:
    weight = weight_of_method("dynamic_scaling", "group", 0, (11, 40))
    parts = weight.weight.detach().split(32, 1)
    expected = torch.stack([fq.search_gamma(part, bits=2, dim=0) for part in parts], 1)
    torch.testing.assert_close(weight.scale.detach(), expected)
    whole = weight_of_method("dynamic_scaling", "row", 0, (11, 40))
    assert (weight() - weight.weight).square().sum() < (whole() - whole.weight).square().sum()


@pytest.mark.parametrize("method", [method for method in METHODS if method != "dynamic_scaling"])
def test_a_norm_that_is_not_there_is_refused(method: str) -> None:
    with pytest.raises(ValidationError, match=f"norm_gradient needs method: dynamic_scaling; {method} does"):
        settings_of(2, weights={"method": method, "norm_gradient": True})


@pytest.mark.parametrize("method", ["pact", "lsq"])
def test_search_gives_every_learned_scale_the_same_start(method: str) -> None:
    ours, dynamic = (weight_of_method(name, "row", 1, bits=4) for name in (method, "dynamic_scaling"))
    torch.testing.assert_close(ours(), dynamic())


def head_loss(model: Any, states: torch.Tensor, chunks: int) -> torch.Tensor:
    """A loss over the head in recomputed chunks, as the objective takes it."""
    parts = [
        checkpoint(lambda part: model.lm_head(part).square().sum(), part, use_reentrant=False)
        for part in states.chunk(chunks)
    ]
    return torch.stack([part for part in parts if part is not None]).sum()


def gradients(model: Any, ids: torch.Tensor, *, hold: bool) -> dict[str, torch.Tensor]:
    model.zero_grad()
    for batch in ids:
        if hold:
            with prepared(model):
                head_loss(model, model.transformer(batch[None]).last_hidden_state[0], 3).backward()
        else:
            head_loss(model, model.transformer(batch[None]).last_hidden_state[0], 1).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("tie", [True, False])
def test_prepared_changes_no_gradient(tiny_gpt2: Any, tie: bool) -> None:
    model = quantized(tiny_gpt2(tie=tie), settings_of(2))
    ids = torch.randint(0, 67, (2, 9), generator=torch.Generator().manual_seed(0))
    ours, theirs = gradients(model, ids, hold=True), gradients(model, ids, hold=False)
    assert ours.keys() == theirs.keys()
    assert all(float(gradient.abs().max()) > 0 for gradient in ours.values())
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-4, atol=1e-4 * float(gradient.abs().max()))


def test_prepared_quantizes_each_weight_once(tiny_gpt2: Any) -> None:
    model = quantized(tiny_gpt2(), settings_of(2))
    ids = torch.randint(0, 67, (1, 9), generator=torch.Generator().manual_seed(0))
    with mock.patch.object(FakeQuantWeight, "_value", autospec=True, side_effect=FakeQuantWeight._value) as counted:
        gradients(model, ids, hold=True)
    assert counted.call_count == len(fake_quantized(model))


def test_prepared_forgets_what_it_held(tiny_gpt2: Any, tiny_inputs: Any) -> None:
    model = quantized(tiny_gpt2(), settings_of(2))
    inputs = tiny_inputs(model)
    before = logits(model, inputs)
    with pytest.raises(RuntimeError, match="stop"), prepared(model):
        raise RuntimeError("stop")
    with torch.no_grad():
        for weight in fake_quantized(model):
            weight.weight.mul_(2)
    assert not torch.equal(before, logits(model, inputs))


def test_prepared_leaves_a_stock_model_alone(tiny_gpt2: Any, tiny_inputs: Any) -> None:
    model = tiny_gpt2()
    inputs = tiny_inputs(model)
    before = logits(model, inputs)
    with prepared(model, torch.bfloat16):
        assert torch.equal(before, logits(model, inputs))


def test_autocast_touches_products_alone(tiny_gpt2: Any) -> None:
    model = quantized(tiny_gpt2(), settings_of(2))
    head, table, x = model.lm_head, model.transformer.wte, torch.randn(4, 32)
    exact = head.quantizer()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(head.quantizer(), exact)
        plain = head(x)
        with prepared(model, torch.bfloat16):
            assert head.quantizer().dtype == torch.bfloat16
            assert torch.equal(head(x), plain)
            assert torch.equal(table(torch.tensor([3, 5])), exact[[3, 5]])
    assert plain.dtype == torch.bfloat16


def test_a_scale_below_zero_stays_usable_and_comes_back() -> None:
    weight = weight_of_method("dynamic_scaling", "tensor", 0)
    with torch.no_grad():
        weight.scale.fill_(-3.0)
    out = weight()
    (-out * weight.weight.detach()).sum().backward()
    assert out.isfinite().all() and weight.scale.grad is not None
    assert weight.scale.grad.item() < 0  # descent raises it
    _, scale = weight.codes()
    assert scale > 0


@pytest.mark.slow
def test_noise_is_for_training_alone(tiny_gpt2: Any, tiny_inputs: Any) -> None:
    stock = tiny_gpt2()
    inputs = tiny_inputs(stock)
    config = {"activations": None}
    full, none, half = (quantized(stock, settings_of(2, noise_p=p, **config)) for p in (1.0, 0.0, 0.5))
    plain = logits(full, inputs)
    assert torch.equal(logits(none, inputs), plain) and torch.equal(logits(half, inputs), plain)
    for model in (full, none, half):
        for weight in fake_quantized(model):
            weight.train()
    assert torch.equal(logits(full, inputs), plain)
    torch.testing.assert_close(logits(none, inputs), logits(stock, inputs), rtol=1e-4, atol=1e-4)
    noisy = fake_quantized(half)[1]
    share = (noisy() == noisy.weight).float().mean().item()
    assert 0.4 < share < 0.6


def test_loss_aware_quantization_learns_the_curvature() -> None:
    weight = weight_of_method("laq", "tensor", 0)
    weight.squares.zero_()
    before = weight().detach()
    emphasis = torch.ones(11, 40)
    emphasis[:, 0] = 1e3
    (weight() * emphasis).sum().backward()
    torch.testing.assert_close(weight.squares, emphasis.square() * 1e-3)
    assert torch.equal(weight.weight.grad, emphasis)
    assert not torch.equal(weight().detach(), before)


def test_codes_and_scales_unpack(tiny_gpt2: Any) -> None:
    model = quantized(tiny_gpt2(hidden=40), settings_of(3))
    state, spec = packed_state(model)
    head = next(matrix for matrix in spec.matrices if matrix.module == "lm_head")
    codes, scale = unpacked(head, state)
    assert head.shares == "transformer.wte"
    assert codes.dtype == torch.int8 and codes.abs().max() == 3 and codes.shape == (67, 40)
    assert torch.equal(fq.dequantize(codes, scale, dim=0), model.lm_head.quantizer())
    assert state["transformer.h.0.attn.c_attn.codes"].shape == (120, 2, 16)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda state: state.pop("transformer.wte.codes"), "lack 'transformer.wte.codes'"),
        (lambda state: state.pop("transformer.ln_f.weight"), "lack 'transformer.ln_f.weight'"),
        (lambda state: state.update(stray=torch.zeros(1)), "quantized tensors contain 'stray'"),
        (lambda state: state.update({"transformer.wte.scale": torch.ones(3)}), "transformer.wte.scale: expected"),
        (lambda state: state.update({"transformer.wpe.weight": torch.ones(3)}), "transformer.wpe.weight: expected"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tiny_gpt2: Any, change: Callable[[Any], Any], says: str) -> None:
    model = quantized(tiny_gpt2(), settings_of(2))
    state, spec = packed_state(model)
    change(state)
    with pytest.raises(ModelError, match=says):
        restore(build(model.config), family_of(model.config), spec, state, dequantize=False)


def test_a_model_of_other_shape_is_refused(tiny_gpt2: Any) -> None:
    model = quantized(tiny_gpt2(), settings_of(2))
    state, spec = packed_state(model)
    with pytest.raises(ModelError, match=r"quantization has the shape \(67, 32\)"):
        restore(tiny_gpt2(vocab=70), family_of(model.config), spec, state, dequantize=False)
    with pytest.raises(ModelError, match=r"names 'transformer.h.1"):
        restore(tiny_gpt2(layers=1), family_of(model.config), spec, state, dequantize=False)


@pytest.mark.parametrize(
    "changes",
    [
        {"weights": {"method": "twn", "bits": 4}},
        {"weights": {"bits": 5}},
        {"activations": {"granularity": "block", "clip": 2.5}},
        {"activations": {"granularity": "block", "symmetric": False}},
        {"activations": {"granularity": "row"}},
        {"activations": {"bits": 4}},
        {"noise_p": 1.5},
        {"weights": {"group": 3}},
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        settings_of(2, **changes)


@pytest.mark.parametrize("granularity", ["tensor", "group"])
def test_histograms_hold_every_weight(tiny: Any, granularity: str) -> None:
    model = quantized(tiny(), settings_of(2, weights={"granularity": granularity}))
    for weight, found in zip(fake_quantized(model), histograms(model), strict=True):
        assert found["module"] == weight.spec.module
        assert len(found["edges"]) == len(found["counts"]) + 1 == 65
        assert sum(found["counts"]) == weight.weight.numel()
        parts = weight().detach().abs().split(weight.spec.group or weight.spec.shape[1], 1)
        largest = torch.stack([part.amax(1) for part in parts])
        assert found["clip"] == pytest.approx(float(largest.mean()), rel=1e-5)


def test_mean_cosine() -> None:
    rows = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    pairs = [nn.functional.cosine_similarity(rows[i], rows[j], dim=0) for i in range(7) for j in range(7) if i != j]
    assert mean_cosine(rows) == pytest.approx(float(torch.stack(pairs).mean()), abs=1e-6)
    assert mean_cosine(torch.eye(4)) == pytest.approx(0)
    assert mean_cosine(torch.tensor([[1.0, 2.0], [2.0, 4.0], [0.0, 0.0]])) == pytest.approx(1)
    assert mean_cosine(torch.zeros(3, 2)) == 0
