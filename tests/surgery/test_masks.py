"""Laws of masks: ones change nothing, every write is multiplied once, gradients arrive, folding is exact."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from compress.errors import ModelError, NothingDoneError
from compress.models import family_of
from compress.models.structure import MASKS, count_parameters, sized_axes
from compress.surgery.cut import cut
from compress.surgery.masks import attach, detach, fold, masks_of

KINDS = ("hidden", "heads", "ffn", "groups")


@pytest.fixture(
    params=["gpt2", "gpt2-untied", "bart", "bart-scaled", "bart-untied", "mbart", "llama", "llama-tied", "llama-mha"]
)
def model(request, tiny_gpt2, tiny_bart, tiny_mbart, tiny_llama):
    if request.param == "mbart":
        return tiny_mbart(decoder_heads=2, scale_embedding=True).double()
    if request.param.startswith("llama"):
        mha = request.param == "llama-mha"
        return tiny_llama(tie=request.param != "llama", kv_heads=4 if mha else 2, bias=mha, head_dim=6).double()
    if request.param.startswith("gpt2"):
        return tiny_gpt2(tie=request.param == "gpt2").double()
    options = {"tie": request.param != "bart-untied", "scale_embedding": request.param == "bart-scaled"}
    return tiny_bart(decoder_heads=2, **options).double()


def soft(model, seed=0, zeros=False):
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for axis in sized_axes(model, family_of(model.config)):
        values[axis.name] = torch.rand(axis.size, generator=generator, dtype=torch.float64) + 0.5
        values[axis.name] *= torch.randint(0, 2, (axis.size,), generator=generator) * 2 - 1
        if zeros and axis.kind != "groups":  # every group is kept, with the heads that are left in it
            values[axis.name][::2] = 0
            values[axis.name][-1] = 0.7
    return values


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_ones_change_nothing_and_detach_restores(model, tiny_inputs):
    inputs = tiny_inputs(model)
    before, names = model(**inputs).logits, list(model.state_dict())
    masks = attach(model, family_of(model.config), KINDS)
    assert torch.allclose(model(**inputs).logits, before, atol=1e-6)
    masks.load(soft(model))
    assert not torch.allclose(model(**inputs).logits, before, atol=1e-3)
    values = detach(model)
    assert torch.equal(model(**inputs).logits, before)
    assert list(model.state_dict()) == names
    assert set(values) == {axis.name for axis in sized_axes(model, family_of(model.config))}


def test_every_write_and_every_norm_output_is_multiplied_once(model, tiny_inputs):
    """What leaves a masked module is m times what it would have sent for the same input."""
    family, values = family_of(model.config), soft(model)
    seen = {}

    def remember(when, name):
        return lambda module, args, output: seen.setdefault((name, when), []).append(output)

    names = [slot.module for slot in family.axes(model.config)[0].slots if slot.side == "out"]
    for name in names:
        model.get_submodule(name).register_forward_hook(remember("before", name))
    attach(model, family, KINDS, values)
    for name in names:
        model.get_submodule(name).register_forward_hook(remember("after", name))
    model(**tiny_inputs(model))
    called = {name for name, _ in seen}
    assert called == set(names) - {"model.shared"}
    for name in called:
        for before, after in zip(seen[name, "before"], seen[name, "after"], strict=True):
            close(after, before * values["hidden"])


def test_the_input_of_a_product_that_reads_units_is_multiplied_once(model, tiny_inputs):
    family, values = family_of(model.config), soft(model)
    axes = family.axes(model.config)
    readers = [(axis, slot) for axis in axes[1:] for slot in axis.slots if slot.side == "in"]
    groups = {axis.holds: axis for axis in axes if axis.holds}
    assert len(readers) == len(axes) - 1 - len(groups)
    seen = {}

    def remember(when, name):
        return lambda module, args: seen.update({(name, when): args[0]})

    for when in ("before", "after"):
        for _, slot in readers:
            model.get_submodule(slot.module).register_forward_pre_hook(remember(when, slot.module))
        if when == "before":
            attach(model, family, KINDS, values)
    model(**tiny_inputs(model))
    for axis, slot in readers:
        mask = values[axis.name]
        if axis.name in groups:  # a group is masked where its heads are read
            mask = mask * values[groups[axis.name].name].repeat_interleave(axis.size // groups[axis.name].size)
        mask = mask.repeat_interleave(slot.width)
        close(seen[slot.module, "after"], seen[slot.module, "before"] * mask)


def test_an_embedding_module_shared_by_two_call_sites_is_masked_once(tiny_bart, tiny_inputs):
    model = tiny_bart().double()
    apart = copy.deepcopy(model)
    model.set_input_embeddings(model.get_input_embeddings())
    assert model.model.encoder.embed_tokens is model.model.decoder.embed_tokens
    values = soft(model)
    for each in (model, apart):
        attach(each, family_of(each.config), KINDS, values)
    close(model(**tiny_inputs(model)).logits, apart(**tiny_inputs(model)).logits)


def test_gradients_reach_every_mask_and_equal_finite_differences(model, tiny_inputs):
    family, inputs = family_of(model.config), tiny_inputs(model)
    masks = attach(model, family, KINDS, soft(model))
    weights = torch.randn(model.config.vocab_size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def loss():
        return (model(**inputs).logits * weights).mean()

    loss().backward()
    for name, mask in masks_of(model).items():
        assert mask.grad is not None
        assert mask.grad.abs().sum() > 0, name
        index, step = mask.numel() // 2, 1e-6
        with torch.no_grad():
            mask[index] += step
            up = loss()
            mask[index] -= 2 * step
            down = loss()
            mask[index] += step
        torch.testing.assert_close(mask.grad[index], (up - down) / (2 * step), rtol=1e-5, atol=1e-9)
    assert len(masks.named()) == len(masks_of(model))


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.booleans(), tie=st.booleans())
def test_folded_is_masked(tiny_gpt2, tiny_bart, tiny_inputs, seed, scale, tie):
    for model in (tiny_gpt2(tie=tie).double(), tiny_bart(tie=tie, scale_embedding=scale).double()):
        family, inputs = family_of(model.config), tiny_inputs(model)
        attach(model, family, KINDS, soft(model, seed))
        masked = model(**inputs).logits
        fold(model, family)
        assert not hasattr(model, MASKS)
        close(model(**inputs).logits, masked)


def test_folded_then_cut_is_masked_with_zeros(model, tiny_inputs):
    family, inputs = family_of(model.config), tiny_inputs(model)
    values = soft(model, zeros=True)
    attach(model, family, KINDS, values)
    masked = model(**inputs).logits
    fold(model, family)
    cut(model, family, {axis: mask.nonzero().flatten() for axis, mask in values.items()})
    close(model(**inputs).logits, masked)


@pytest.mark.parametrize("written", ["in place", "by a step"])
def test_a_unit_closed_without_loading_is_out_of_the_statistics_too(model, tiny_inputs, written):
    """Whatever writes the zeros, the masked model computes what the cut one does."""
    family, inputs = family_of(model.config), tiny_inputs(model)
    values = soft(model, zeros=True)
    masks = attach(model, family, KINDS)
    with torch.no_grad():
        for axis, mask in masks.named().items():
            if written == "in place":
                mask.copy_(values[axis])
            else:
                mask.grad = mask - values[axis]
    if written == "by a step":
        torch.optim.SGD(masks.parameters(), lr=1.0).step()
        assert all((mask[::2] == 0).all() for axis, mask in masks.named().items() if "groups" not in axis)
    masked = model(**inputs).logits
    fold(model, family)
    cut(model, family, {axis: mask.nonzero().flatten() for axis, mask in values.items()})
    close(model(**inputs).logits, masked)


def test_nothing_open_is_finite(model, tiny_inputs):
    masks = attach(model, family_of(model.config), ("hidden",))
    masks.load({"hidden": torch.zeros(masks["hidden"].numel())})
    logits = model(**tiny_inputs(model)).logits
    logits.sum().backward()
    assert logits.isfinite().all()
    assert masks["hidden"].grad.isfinite().all()


def test_masks_checkpoint_with_the_model_but_stay_out_of_stock_files(model, tiny_inputs, tmp_path):
    family, inputs = family_of(model.config), tiny_inputs(model)
    plain = copy.deepcopy(model)
    stock = count_parameters(model, sized_axes(model, family), {})
    attach(model, family, KINDS, soft(model, zeros=True))
    masked = model(**inputs).logits
    assert count_parameters(model, sized_axes(model, family), {}) == stock
    other = copy.deepcopy(plain)
    attach(other, family, KINDS)
    other.load_state_dict(model.state_dict())
    close(other(**inputs).logits, masked)
    model.save_pretrained(tmp_path)
    stored, state = load_file(tmp_path / "model.safetensors"), plain.state_dict()
    assert stored.keys() <= state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in stored.items())


def test_a_copy_of_a_masked_model_has_masks_of_its_own(tiny_gpt2, tiny_inputs):
    model = tiny_gpt2().double()
    attach(model, family_of(model.config), KINDS)
    clone = copy.deepcopy(model)
    before = model(**tiny_inputs(model)).logits
    clone.compress_masks.load(soft(clone))
    assert torch.equal(model(**tiny_inputs(model)).logits, before)
    assert not torch.allclose(clone(**tiny_inputs(model)).logits, before)
    detach(clone)
    assert torch.equal(clone(**tiny_inputs(model)).logits, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_the_dtype_of_activations(tiny_gpt2, tiny_inputs, dtype):
    model = tiny_gpt2()
    inputs = tiny_inputs(model)
    with torch.autocast("cpu", dtype):
        before = model(**inputs).logits
        masks = attach(model, family_of(model.config), KINDS)
        assert torch.equal(model(**inputs).logits, before)
        masks.load({axis: value.float() for axis, value in soft(model, zeros=True).items()})
        assert model(**inputs).logits.dtype == before.dtype


def test_mistakes_are_named(tiny_gpt2):
    model = tiny_gpt2()
    family = family_of(model.config)
    with pytest.raises(ModelError, match="no masks"):
        masks_of(model)
    with pytest.raises(NothingDoneError, match="rotary"):
        attach(model, family, ("rotary",))
    with pytest.raises(ModelError, match=r"layer\.0\.ffn"):
        attach(model, family, ("ffn",), {"layer.1.ffn": torch.ones(128)})
    attach(model, family, ("ffn",))
    with pytest.raises(ModelError, match="already"):
        attach(model, family, ("hidden",))
