"""Laws of a quantized encoder and decoder: each product and call site once, and scales and biases where they were."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from compress.models import family_of
from compress.models.loading import build
from compress.surgery.cut import cut
from compress.surgery.masks import attach, fold
from compress.surgery.quantization import Product, Quantization, Table, packed_state, quantize, restore

from .test_cut import keep_of
from .test_quantize import METHODS, settings_of

SHAPE = {"layers": 1, "decoder_layers": 2, "heads": 4, "decoder_heads": 2, "ffn": 13, "decoder_ffn": 7}
SITES = ("model.shared", "model.encoder.embed_tokens", "model.decoder.embed_tokens")


@pytest.fixture
def bart(tiny_bart: Any) -> Any:
    """A function that builds a model whose two stacks differ in everything that may differ."""
    return lambda **options: tiny_bart(**{**SHAPE, **options})


def quantized(model: Any, config: Quantization) -> Any:
    model = copy.deepcopy(model)
    quantize(model, family_of(model.config), config)
    return model


def filled(fresh: Any, model: Any, *, dequantize: bool = False) -> Any:
    state, spec = packed_state(model)
    restore(fresh, family_of(model.config), spec, state, dequantize=dequantize)
    return fresh.eval()


def seen(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """States of the encoder and logits of the decoder."""
    with torch.no_grad():
        found = model(**inputs)
    return found.encoder_last_hidden_state, found.logits


@pytest.mark.parametrize("tie", [True, False])
def test_every_product_and_call_site_is_quantized_once(bart: Any, tie: bool) -> None:
    stock = bart(tie=tie)
    products = {name for name, module in stock.named_modules() if isinstance(module, nn.Linear)}
    owners = {id(stock.get_submodule(name).weight) for name in (*products, *SITES)}
    model = quantized(stock, settings_of(2, embedding={"bits": 8}))
    _, spec = packed_state(model)
    assert len(spec.matrices) == len({matrix.module for matrix in spec.matrices})
    assert {matrix.module for matrix in spec.matrices} == products | set(SITES)
    assert len(spec.stored) == len(owners)
    assert {matrix.module for matrix in spec.matrices if matrix.bits == 8} == {*SITES, "lm_head"}
    for name, module in model.named_modules():
        assert isinstance(module, Product) == (name in products) and isinstance(module, Table) == (name in SITES), name
        if name.endswith("embed_positions"):
            assert type(module) is type(stock.get_submodule(name)) and module.weight is not None
    state, _ = packed_state(model)
    for name, tensor in stock.state_dict().items():
        if name.rpartition(".")[0] not in products | set(SITES) or name.endswith("bias"):
            assert torch.equal(state[name], tensor), name


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_both_stacks_compute_what_is_packed(bart: Any, tiny_inputs: Any, method: str, scale: bool) -> None:
    stock = bart(scale_embedding=scale)
    model = quantized(stock, settings_of(2, weights={"method": method}))
    inputs = tiny_inputs(stock, batch=4)
    exact = seen(model, inputs)
    for ours, theirs in zip(seen(filled(build(stock.config), model), inputs), exact, strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(exact, seen(stock, inputs), strict=True):
        assert not torch.equal(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("done", ["quantized", "folded", "cut", "folded and cut"])
@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("scale", [False, True])
def test_scale_and_bias_are_those_of_the_stock_classes(
    bart: Any, tiny_inputs: Any, scale: bool, tie: bool, done: str
) -> None:
    """With inputs left alone a quantized model is the stock one that holds its dequantized weights."""
    model, fresh = (bart(scale_embedding=scale, tie=tie, seed=seed) for seed in (0, 1))
    family, inputs, bias = family_of(model.config), tiny_inputs(model), model.final_logits_bias.clone()
    before = seen(model, inputs)[1]
    keep = keep_of(model, 3)
    if "folded" in done:
        values = {axis.name: torch.linspace(0.5, 1.5, axis.size) for axis in family.axes(model.config)}
        attach(model, family, ("hidden", "heads", "ffn"), values)
        before = seen(model, inputs)[1]
        fold(model, family)
        torch.testing.assert_close(seen(model, inputs)[1], before, atol=1e-4, rtol=1e-4)
    if "cut" in done:
        cut(fresh, family, keep)
        cut(model, family, keep)
        before = seen(model, inputs)[1]
    coded = quantized(model, settings_of(8, activations=None, weights={"granularity": "row"}))
    hidden = model.model.shared.embedding_dim
    for site in SITES:
        assert coded.get_submodule(site).scale == (math.sqrt(hidden) if scale else 1.0)
        assert model.get_submodule(site).embed_scale == coded.get_submodule(site).scale
    assert torch.equal(coded.final_logits_bias, bias)
    ours = seen(coded, inputs)[1]
    torch.testing.assert_close(ours, before, rtol=0.05, atol=0.05 * float(before.std()))
    plain = filled(fresh, coded, dequantize=True)
    assert torch.equal(plain.final_logits_bias, bias)
    torch.testing.assert_close(seen(plain, inputs)[1], ours, rtol=1e-4, atol=1e-4)


def test_layer_wise_activations_are_asymmetric_after_both_activation_functions(bart: Any) -> None:
    model = quantized(bart(), settings_of(activations={"granularity": "tensor"}))
    products = {name: module for name, module in model.named_modules() if isinstance(module, Product)}
    after = {name for name, module in products.items() if module.spec.activations == "asymmetric"}
    assert after == {"model.encoder.layers.0.fc2", "model.decoder.layers.0.fc2", "model.decoder.layers.1.fc2"}
