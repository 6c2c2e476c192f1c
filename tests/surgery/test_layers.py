"""Law: a model without some layers computes what the whole model computes when those layers are skipped."""

from __future__ import annotations

import copy
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress.errors import ModelError
from compress.models import family_of
from compress.models.loading import build
from compress.models.structure import count_parameters, sized_axes, stock_tensors
from compress.surgery.cut import cut
from compress.surgery.layers import chosen, drop, renumbered, shallower
from compress.surgery.masks import attach

KEEPS = [[5], [0, 5], [0, 2, 5], [1, 2, 4], [0, 1, 2, 4, 5]]


def skipping(model: Any, keep: Any) -> Any:
    """A copy whose layers that are not in ``keep`` hand on what they are given."""
    model = copy.deepcopy(model)
    for stack in family_of(model.config).stacks:
        for n, layer in enumerate(model.get_submodule(stack.layers)):
            if n not in keep.get(stack.name, [n]):
                layer.register_forward_hook(handing_on)
    return model


def handing_on(module: Any, args: Any, output: Any) -> Any:
    return (args[0], *output[1:]) if isinstance(output, tuple) else args[0]


def dropped(model: Any, keep: Any) -> Any:
    model = copy.deepcopy(model)
    drop(model, family_of(model.config), keep)
    return model


def logits(model: Any, inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**inputs, use_cache=False).logits
    return found


def assert_equal(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


# -- which layers stay


@pytest.mark.parametrize(
    ("count", "depth", "layers"),
    [
        (1, 6, [5]),
        (2, 6, [0, 5]),
        (3, 6, [0, 2, 5]),
        (4, 6, [0, 2, 3, 5]),
        (5, 6, [0, 1, 3, 4, 5]),
        (6, 6, [0, 1, 2, 3, 4, 5]),
        (1, 12, [11]),
        (3, 12, [0, 5, 11]),
        (6, 12, [0, 2, 4, 7, 9, 11]),
        (2, 3, [0, 2]),
        (1, 1, [0]),
    ],
)
def test_maps(count: int, depth: int, layers: list[int]) -> None:
    assert chosen(count, depth) == layers


@given(depth=st.integers(1, 60).filter(lambda depth: depth != 6), share=st.floats(0, 1))
def test_other_depths_are_spaced_evenly_from_first_to_last(depth: int, share: float) -> None:
    count = 1 + round(share * (depth - 1))
    layers = chosen(count, depth)
    assert len(layers) == len(set(layers)) == count and layers == sorted(layers) and layers[-1] == depth - 1
    for i, layer in enumerate(layers[:-1]):
        exact = Fraction(i * (depth - 1), count - 1)
        assert Fraction(-1, 2) < exact - layer <= Fraction(1, 2)


@pytest.mark.parametrize(("count", "depth"), [(0, 6), (7, 6), (-1, 4), (5, 4)])
def test_other_counts_are_refused(count: int, depth: int) -> None:
    with pytest.raises(ModelError, match=f"cannot keep {count} of {depth} layers; allowed: 1 to {depth}"):
        chosen(count, depth)


# -- the model that is left


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("by_layer", [False, True])
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("keep", KEEPS)
def test_dropped_is_skipped_on_gpt2(
    keep: list[int], scaled: bool, by_layer: bool, tie: bool, tiny_gpt2: Any, tiny_inputs: Any
) -> None:
    first = tiny_gpt2(layers=6, hidden=16, tie=tie)
    config = copy.deepcopy(first.config)
    config.scale_attn_weights, config.scale_attn_by_inverse_layer_idx = scaled, by_layer
    model = build(config)
    model.load_state_dict({name: 2 * tensor for name, tensor in first.state_dict().items()})
    inputs = tiny_inputs(model.double())
    short = dropped(model, {"decoder": keep})
    assert_equal(logits(short, inputs), logits(skipping(model, {"decoder": keep}), inputs))
    assert (logits(short, inputs) - logits(model, inputs)).abs().max() > 1e-2


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize(
    "keep",
    [
        {"encoder": [0, 2, 5]},
        {"decoder": [0, 2, 5]},
        {"encoder": [0, 2, 5], "decoder": [5]},
        {"encoder": [1], "decoder": [0, 3]},
    ],
)
def test_dropped_is_skipped_on_bart(keep: Any, scale: bool, tiny_bart: Any, tiny_inputs: Any) -> None:
    model = tiny_bart(layers=6, hidden=16, decoder_heads=2, ffn=12, scale_embedding=scale).double()
    inputs, short = tiny_inputs(model), dropped(model, keep)
    assert_equal(logits(short, inputs), logits(skipping(model, keep), inputs))
    assert (logits(short, inputs) - logits(model, inputs)).abs().max() > 1e-2


def test_layers_that_write_nothing_may_go(tiny_gpt2: Any, tiny_inputs: Any) -> None:
    model = tiny_gpt2(layers=4).double()
    for n in (1, 2):
        for product in (model.transformer.h[n].attn.c_proj, model.transformer.h[n].mlp.c_proj):
            for parameter in product.parameters():
                parameter.data.zero_()
    inputs = tiny_inputs(model)
    assert_equal(logits(dropped(model, {"decoder": [0, 3]}), inputs), logits(model, inputs))
    assert not torch.allclose(logits(dropped(model, {"decoder": [0, 2]}), inputs), logits(model, inputs))


@pytest.mark.parametrize("family", ["tiny_gpt2", "tiny_bart", "tiny_mbart", "tiny_llama"])
def test_cached_generation_is_that_without_a_cache(family: str, request: Any, tiny_inputs: Any) -> None:
    """Layers must not look for the cache of the place they had."""
    model = request.getfixturevalue(family)(layers=6, hidden=16)
    keep = {stack.name: [2, 4, 5] if stack.name == "decoder" else [1] for stack in family_of(model.config).stacks}
    short = dropped(model, keep)
    inputs = {name: tensor for name, tensor in tiny_inputs(model).items() if name != "decoder_input_ids"}
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "num_beams": 2, "pad_token_id": 0}
    with_cache, without = (short.generate(**inputs, **options, use_cache=use) for use in (True, False))
    assert torch.equal(with_cache, without)
    cache = short(**tiny_inputs(model), use_cache=True).past_key_values
    assert len(getattr(cache, "self_attention_cache", cache).layers) == 3


@pytest.mark.parametrize("family", ["tiny_gpt2", "tiny_bart", "tiny_mbart", "tiny_llama"])
def test_the_config_says_what_is_left(family: str, request: Any) -> None:
    model = request.getfixturevalue(family)(layers=6, hidden=16)
    table = family_of(model.config)
    keep = {stack.name: [0, 5] if stack.name == "encoder" else [0, 2, 5] for stack in table.stacks}
    short = dropped(model, keep)
    assert short.config.to_dict() == shallower(model.config, table, keep).to_dict()
    with torch.device("meta"):
        stock = build(short.config)
    shapes = [{name: tensor.shape for name, tensor in each.state_dict().items()} for each in (short, stock)]
    assert shapes[0] == shapes[1]
    assert stock.config.num_hidden_layers == len(keep.get("encoder", keep["decoder"]))


@pytest.mark.parametrize("family", ["tiny_gpt2", "tiny_bart", "tiny_mbart", "tiny_llama"])
def test_coverage_counts_what_went(family: str, request: Any) -> None:
    model = request.getfixturevalue(family)(layers=3, hidden=16)
    table = family_of(model.config)
    per_layer = len([m for m in model.get_submodule(table.stacks[-1].layers)[0].modules() if m._parameters])
    short = copy.deepcopy(model)
    coverage = drop(short, table, {"decoder": [0, 2]})
    numbers = [sum(tensor.numel() for tensor in stock_tensors(each)) for each in (model, short)]
    assert coverage.modules_touched == per_layer
    assert coverage.parameters_touched == numbers[0] - numbers[1] > 0
    assert (coverage.bytes_before, coverage.bytes_after) == (4 * numbers[0], 4 * numbers[1])
    assert count_parameters(short, table.axes(short.config), {}) == numbers[1]


def kept_units(axis: Any, n: int, *, shared: bool) -> list[int]:
    """Units that differ from axis to axis; query heads that share keys and values are kept two by two or one by one."""
    if axis.kind == "heads" and shared:
        return [[0, 2], [1, 3], [0, 1, 2, 3], [1, 2]][n % 4]
    return list(range(n % (axis.size - 1), axis.size))


@pytest.mark.parametrize("family", ["tiny_gpt2", "tiny_bart", "tiny_mbart", "tiny_llama"])
@pytest.mark.parametrize("kind", ["heads", "ffn", "hidden"])
def test_cut_and_drop_may_change_places(kind: str, family: str, request: Any, tiny_inputs: Any) -> None:
    """With sizes of its own in every layer, so that a layer which is taken for another shows."""
    model = request.getfixturevalue(family)(layers=4, hidden=16).double()
    table = family_of(model.config)
    units = {
        axis.name: kept_units(axis, n, shared=family == "tiny_llama")
        for n, axis in enumerate(table.axes(model.config))
        if axis.kind == kind and kind != "hidden"
    } or {"hidden": [0, 3, 4, 9]}
    layers = {"decoder": [0, 3]}
    one, other = copy.deepcopy(model), copy.deepcopy(model)
    cut(one, table, units)
    drop(one, table, layers)
    drop(other, table, layers)
    cut(other, table, renumbered(table, units, layers))
    states = one.state_dict(), other.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    assert [axis.size for axis in sized_axes(one, table)] == [axis.size for axis in sized_axes(other, table)]
    inputs = tiny_inputs(model)
    assert torch.equal(logits(one, inputs), logits(other, inputs))


def test_a_shape_that_becomes_uniform_becomes_stock(tiny_gpt2: Any) -> None:
    model = tiny_gpt2(layers=3, heads=4, hidden=16, ffn=40)
    table = family_of(model.config)
    cut(model, table, {"layer.1.ffn": range(8), "layer.2.ffn": range(8)})
    assert model.config.n_inner == 40
    drop(model, table, {"decoder": [1, 2]})
    assert model.config.n_inner == 8


# -- what is refused


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"encoder": [0]}, "keep names layers 'encoder', which this model lacks; allowed: decoder"),
        ({"decoder": []}, "must be ascending layers, at least one, below 3"),
        ({"decoder": [0, 3]}, "must be ascending layers, at least one, below 3"),
        ({"decoder": [-1, 2]}, "must be ascending layers"),
        ({"decoder": [1, 0]}, "must be ascending layers"),
        ({"decoder": [1, 1]}, "must be ascending layers"),
    ],
)
def test_layers_must_be_there(keep: Any, message: str, tiny_gpt2: Any) -> None:
    with pytest.raises(ModelError, match=message):
        dropped(tiny_gpt2(layers=3), keep)


def test_masks_come_off_first(tiny_gpt2: Any) -> None:
    model = tiny_gpt2(layers=3)
    attach(model, family_of(model.config), ["ffn"])
    with pytest.raises(ModelError, match="detach the masks"):
        drop(model, family_of(model.config), {"decoder": [0]})
