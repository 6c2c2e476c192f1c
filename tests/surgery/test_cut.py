"""Law: a model with binary masks computes what the cut model computes, whatever is kept."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.errors import ModelError, NothingDoneError
from compress.models import family_of
from compress.models.loading import build
from compress.models.structure import MASKS, count_parameters, sized_axes, stock_tensors
from compress.surgery.cut import compose, cut, ranked
from compress.surgery.masks import attach

KINDS = ("hidden", "heads", "ffn", "groups")


def keep_of(model: Any, seed: int, kinds: tuple[str, ...] = KINDS) -> dict[str, torch.Tensor]:
    """Random units of every axis of these kinds, at least one, sizes of their own per axis."""
    generator = torch.Generator().manual_seed(seed)
    keep = {}
    axes = sized_axes(model, family_of(model.config))
    groups = {axis.holds: axis for axis in axes if axis.holds}
    for axis in sorted(axes, key=lambda axis: axis.name in groups):
        if axis.name in groups and (axis.kind in kinds or groups[axis.name].kind in kinds):
            group = groups[axis.name]
            held = axis.size // group.size
            each = int(torch.randint(1, held + 1, (), generator=generator)) if axis.kind in kinds else held
            kept = keep.get(group.name, torch.arange(group.size))
            keep[axis.name] = torch.cat(
                [torch.randperm(held, generator=generator)[:each].sort().values + held * int(g) for g in kept]
            )
        elif axis.kind in kinds:
            size = int(torch.randint(1, axis.size + 1, (), generator=generator))
            size = max(size, 2) if axis.kind == "hidden" else size
            keep[axis.name] = torch.randperm(axis.size, generator=generator)[:size].sort().values
    return keep


def binary(model: Any, keep: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    values = {}
    for axis in sized_axes(model, family_of(model.config)):
        values[axis.name] = torch.zeros(axis.size) if axis.name in keep else torch.ones(axis.size)
        if axis.name in keep:
            values[axis.name][keep[axis.name]] = 1
    return values


def masked_and_cut(model: Any, keep: dict[str, torch.Tensor], inputs: Any) -> tuple[torch.Tensor, torch.Tensor, Any]:
    model = model.double()
    family = family_of(model.config)
    smaller = copy.deepcopy(model)
    attach(model, family, KINDS, binary(model, keep))
    cut(smaller, family, keep)
    with torch.no_grad():
        return model(**inputs).logits, smaller(**inputs).logits, smaller


def assert_equal(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(
    heads=st.sampled_from([1, 2, 4]),
    layers=st.sampled_from([1, 2]),
    tie=st.booleans(),
    kinds=st.sampled_from([KINDS, ("hidden",), ("heads",), ("ffn",), ("heads", "ffn")]),
    seed=st.integers(0, 10**6),
)
def test_masked_is_cut_on_gpt2(tiny_gpt2, tiny_inputs, heads, layers, tie, kinds, seed):
    model = tiny_gpt2(heads=heads, layers=layers, tie=tie, hidden=16, seed=seed)
    masked, smaller, _ = masked_and_cut(model, keep_of(model, seed, kinds), tiny_inputs(model))
    assert_equal(masked, smaller)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    heads=st.sampled_from([(1, 1), (1, 4), (2, 4), (4, 2), (4, 4)]),
    layers=st.sampled_from([(1, 1), (1, 3), (2, 1), (2, 2)]),
    ffn=st.sampled_from([(12, 12), (13, 7), (1, 9)]),
    tie=st.booleans(),
    scale=st.booleans(),
    kinds=st.sampled_from([KINDS, ("hidden",), ("heads",), ("ffn",), ("heads", "ffn")]),
    seed=st.integers(0, 10**6),
)
def test_masked_is_cut_on_bart(tiny_bart, tiny_inputs, heads, layers, ffn, tie, scale, kinds, seed):
    model = tiny_bart(
        heads=heads[0],
        decoder_heads=heads[1],
        layers=layers[0],
        decoder_layers=layers[1],
        ffn=ffn[0],
        decoder_ffn=ffn[1],
        tie=tie,
        scale_embedding=scale,
        hidden=16,
        seed=seed,
    )
    masked, smaller, _ = masked_and_cut(model, keep_of(model, seed, kinds), tiny_inputs(model))
    assert_equal(masked, smaller)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    heads=st.sampled_from([(1, 1), (4, 1), (4, 2), (4, 4), (6, 3)]),
    layers=st.sampled_from([1, 2]),
    ffn=st.sampled_from([12, 13]),
    head_dim=st.sampled_from([2, 6]),
    tie=st.booleans(),
    bias=st.booleans(),
    kinds=st.sampled_from([KINDS, ("hidden",), ("heads",), ("ffn",), ("groups",), ("groups", "ffn")]),
    seed=st.integers(0, 10**6),
)
def test_masked_is_cut_on_llama(tiny_llama, tiny_inputs, heads, layers, ffn, head_dim, tie, bias, kinds, seed):
    model = tiny_llama(
        heads=heads[0],
        kv_heads=heads[1],
        layers=layers,
        ffn=ffn,
        head_dim=head_dim,
        tie=tie,
        bias=bias,
        hidden=24,  # a multiple of every number of heads, as transformers 5 wants it
        seed=seed,
    )
    masked, smaller, _ = masked_and_cut(model, keep_of(model, seed, kinds), tiny_inputs(model))
    assert_equal(masked, smaller)


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(
    heads=st.sampled_from([(1, 4), (4, 2), (4, 4)]),
    tie=st.booleans(),
    scale=st.booleans(),
    kinds=st.sampled_from([KINDS, ("hidden",), ("heads", "ffn")]),
    seed=st.integers(0, 10**6),
)
def test_masked_is_cut_on_mbart(tiny_mbart, tiny_inputs, heads, tie, scale, kinds, seed):
    model = tiny_mbart(
        heads=heads[0], decoder_heads=heads[1], tie=tie, scale_embedding=scale, hidden=16, ffn=12, seed=seed
    )
    masked, smaller, _ = masked_and_cut(model, keep_of(model, seed, kinds), tiny_inputs(model))
    assert_equal(masked, smaller)


@pytest.mark.parametrize(
    "keep",
    [
        {"layer.0.heads": [0, 1, 2]},
        {"layer.0.groups": [0], "layer.0.heads": [0, 2]},
        {"layer.0.groups": [1], "layer.0.heads": [0, 1]},
    ],
)
def test_kept_groups_hold_equally_many_heads(tiny_llama, keep):
    model = tiny_llama()
    with pytest.raises(
        ModelError, match=r"keep of axis 'layer.0.heads' must contain the same number of units of each of"
    ):
        cut(model, family_of(model.config), keep)


def test_query_heads_are_ranked_within_their_groups(tiny_llama):
    axes = sized_axes(model := tiny_llama(heads=6, kv_heads=3, hidden=36), family_of(model.config))
    scores = {"layer.0.heads": torch.tensor([6.0, 5, 1, 2, 4, 3]), "layer.0.groups": torch.tensor([1.0, 3, 2])}
    assert ranked(scores, {"layer.0.heads": 3}, axes)["layer.0.heads"].tolist() == [0, 3, 4]
    both = ranked(scores, {"layer.0.heads": 2, "layer.0.groups": 2}, axes)
    assert (both["layer.0.groups"].tolist(), both["layer.0.heads"].tolist()) == ([1, 2], [3, 4])
    with pytest.raises(ModelError, match="cannot keep 4 units in 3 groups; allowed: 3, 6"):
        ranked(scores, {"layer.0.heads": 4}, axes)


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(scale=st.booleans(), seed=st.integers(0, 10**6))
def test_two_cuts_are_one_of_the_composed_units(tiny_bart, tiny_inputs, scale, seed):
    once = tiny_bart(scale_embedding=scale, hidden=16).double()
    twice = copy.deepcopy(once)
    family = family_of(once.config)
    first = keep_of(twice, seed)
    cut(twice, family, first)
    second = keep_of(twice, seed + 1, ("hidden", "heads"))
    cut(twice, family, second)
    cut(once, family, compose(first, second))
    inputs = tiny_inputs(once)
    assert_equal(once(**inputs).logits, twice(**inputs).logits)


def test_a_cut_of_nothing_changes_nothing(tiny_gpt2, tiny_inputs):
    model = tiny_gpt2()
    before = model(**tiny_inputs(model)).logits
    coverage = cut(model, family_of(model.config), {"hidden": range(32)})
    assert torch.equal(model(**tiny_inputs(model)).logits, before)
    assert coverage.modules_touched == coverage.parameters_touched == 0
    assert coverage.bytes_before == coverage.bytes_after
    with pytest.raises(NothingDoneError, match="prune"):
        coverage.require("prune")


@pytest.mark.parametrize("scale", [False, True])
def test_shared_parameters_stay_shared_and_count_once(tiny_gpt2, tiny_bart, tiny_mbart, tiny_llama, scale):
    models = (tiny_gpt2(), tiny_bart(scale_embedding=scale), tiny_mbart(scale_embedding=scale), tiny_llama(tie=True))
    for model in models:
        family = family_of(model.config)
        tensors = len(stock_tensors(model))
        keep = keep_of(model, 0)
        expected = count_parameters(
            model, family.axes(model.config), {axis: len(units) for axis, units in keep.items()}
        )
        coverage = cut(model, family, keep)
        weights = {model.get_submodule(name).weight for name in (*family.embeddings, family.head)}
        assert len(weights) == 1
        assert len(stock_tensors(model)) == tensors
        assert sum(tensor.numel() for tensor in stock_tensors(model)) == expected
        assert coverage.bytes_after == 4 * expected < coverage.bytes_before
        assert 0 < coverage.modules_touched <= coverage.modules_total


def test_buffers_and_requires_grad_survive(tiny_bart):
    model = tiny_bart()
    model.model.decoder.layers[0].fc1.weight.requires_grad_(False)
    bias = model.final_logits_bias.clone()
    cut(model, family_of(model.config), {"decoder.layer.0.ffn": [1, 5, 7]})
    assert torch.equal(model.final_logits_bias, bias)
    assert not model.model.decoder.layers[0].fc1.weight.requires_grad
    assert model.model.decoder.layers[0].fc2.weight.requires_grad
    assert model.model.decoder.layers[0].fc1.out_features == 3


@pytest.mark.slow
@pytest.mark.parametrize("num_beams", [1, 3])
def test_generation_with_a_cache_equals_generation_without(
    tiny_gpt2, tiny_bart, tiny_mbart, tiny_llama, tiny_inputs, num_beams
):
    seq2seq = {"decoder_heads": 2, "scale_embedding": True}
    for model in (tiny_gpt2(), tiny_bart(**seq2seq), tiny_mbart(**seq2seq), tiny_llama(), tiny_llama(kv_heads=4)):
        cut(model, family_of(model.config), keep_of(model, 3))
        inputs = tiny_inputs(model)
        inputs.pop("decoder_input_ids", None)
        options = {
            "max_new_tokens": 6,
            "min_new_tokens": 6,
            "do_sample": False,
            "num_beams": num_beams,
            "pad_token_id": 1,
        }
        cached = model.generate(**inputs, **options)
        assert torch.equal(cached, model.generate(**inputs, **options, use_cache=False))


def uniform_keep(model: Any, sizes: dict[str, int]) -> dict[str, torch.Tensor]:
    axes = sized_axes(model, family_of(model.config))
    chosen = {axis.name: sizes[axis.kind] for axis in axes if axis.kind in sizes}
    return ranked({axis.name: torch.rand(axis.size) for axis in axes}, chosen, axes)


RELOAD = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
sys.modules["compress"] = None
inputs, expected, task = torch.load(sys.argv[1] + "/case.pt", weights_only=True)
model = {"causal": AutoModelForCausalLM, "seq2seq": AutoModelForSeq2SeqLM}[task].from_pretrained(sys.argv[1]).eval()
assert torch.allclose(model(**inputs).logits, expected, atol=1e-6), (model(**inputs).logits - expected).abs().max()
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "bart", "mbart", "llama"])
def test_a_uniform_cut_reloads_with_the_stock_library_alone(request, tiny_inputs, tmp_path, name):
    options = {"decoder_heads": 2, "scale_embedding": True} if "bart" in name else {}
    model = request.getfixturevalue(f"tiny_{name}")(**options)
    family = family_of(model.config)
    keep = uniform_keep(model, {"hidden": 16, "heads": 2, "ffn": 20})
    if family.task == "seq2seq":
        keep |= {axis: [1] for axis in keep if axis.startswith("decoder") and axis.endswith("heads")}
    config = family.uniform_config(model.config, {axis: len(units) for axis, units in keep.items()})
    cut(model, family, keep)
    assert model.config.to_dict() == config.to_dict()
    inputs = tiny_inputs(model)
    model.save_pretrained(tmp_path)
    torch.save((inputs, model(**inputs).logits.detach(), family.task), tmp_path / "case.pt")
    done = subprocess.run([sys.executable, "-c", RELOAD, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_cut_beyond_the_stock_classes_reloads_by_cutting_the_root(tiny_bart, tiny_inputs):
    model = tiny_bart(scale_embedding=True)
    family, root = family_of(model.config), copy.deepcopy(model.config)
    keep = keep_of(model, 5)
    cut(model, family, keep)
    assert model.config.to_dict() == root.to_dict()
    again = build(root)
    cut(again, family, keep)
    again.load_state_dict(model.state_dict())
    inputs = tiny_inputs(model)
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)


def test_ranked_keeps_the_largest_magnitudes_in_ascending_order():
    scores = {"hidden": torch.tensor([0.1, -3.0, 2.0, 2.0, 0.0]), "layer.0.ffn": torch.tensor([1.0, 1.0, 1.0])}
    keep = ranked(scores, {"hidden": 3, "layer.0.ffn": 2})
    assert keep["hidden"].tolist() == [1, 2, 3]
    assert keep["layer.0.ffn"].tolist() == [0, 1]
    with pytest.raises(ModelError, match="1 to 5"):
        ranked(scores, {"hidden": 6})
    with pytest.raises(ModelError, match="no scores"):
        ranked(scores, {"layer.9.ffn": 1})


@pytest.mark.parametrize(
    ("keep", "text"),
    [
        ({"layers": [0]}, "'layers'"),
        ({"hidden": []}, "at least one"),
        ({"hidden": [0, 32]}, "below 32"),
        ({"hidden": [-1, 2]}, "ascending"),
        ({"hidden": [2, 1]}, "ascending"),
        ({"hidden": [1, 1]}, "ascending"),
    ],
)
def test_keep_that_cannot_be_cut_raises(tiny_gpt2, keep, text):
    model = tiny_gpt2()
    with pytest.raises(ModelError, match=text):
        cut(model, family_of(model.config), keep)


def test_a_masked_model_is_not_cut(tiny_gpt2):
    model = tiny_gpt2()
    family = family_of(model.config)
    attach(model, family, ("ffn",))
    assert hasattr(model, MASKS)
    with pytest.raises(ModelError, match="detach"):
        cut(model, family, {"hidden": [0, 1]})
