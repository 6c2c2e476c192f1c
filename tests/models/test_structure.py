"""Tables against the stock models: parameter counts, sizes, attentions, heads, and the configs they can express."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BartConfig, GPT2Config, OPTConfig

from compress.errors import ModelError
from compress.models import family_of
from compress.models.loading import build
from compress.models.structure import Slot, count_parameters, sides, sized_axes, stock_tensors


def tiny(name, tiny_gpt2, tiny_bart, **options):
    """Sizes chosen so that no two dimensions of the model are equal by chance."""
    sizes = {"hidden": 24, "heads": 3, "ffn": 40, "vocab": 67, "positions": 50}
    return tiny_gpt2(**sizes, **options) if name == "gpt2" else tiny_bart(**sizes, **options)


def test_count_and_axes_of_every_family(tiny_model):
    axes = family_of(tiny_model.config).axes(tiny_model.config)
    assert count_parameters(tiny_model, axes, {}) == counted(tiny_model)
    assert sized_axes(tiny_model, family_of(tiny_model.config)) == axes
    reached = {id(side.parameter) for side in sides(tiny_model, axes)}
    rest = {name for name, parameter in tiny_model.named_parameters() if id(parameter) not in reached}
    assert rest == set()


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_a_uniform_llama_opens_with_the_stock_class(tiny_llama, kv_heads):
    model = tiny_llama(kv_heads=kv_heads, head_dim=6)
    family = family_of(model.config)
    axes = family.axes(model.config)
    sizes = {
        axis.name: axis.size // 2 if axis.size > 1 else 1 for axis in axes if axis.kind != "groups" or kv_heads > 1
    }
    sizes |= {axis.name: axis.size for axis in axes if axis.name not in sizes}
    with torch.device("meta"):
        small = build(family.uniform_config(model.config, sizes))
    assert count_parameters(model, axes, sizes) == counted(small)
    assert {axis.name: axis.size for axis in sized_axes(small, family)} == sizes


@pytest.fixture
def model(tiny_model):
    return tiny_model


def counted(model):
    saved = [bias] if (bias := getattr(model, "final_logits_bias", None)) is not None else []
    return sum(tensor.numel() for tensor in [*model.parameters(), *saved])


def test_count_equals_the_sum_over_tensors(model):
    assert count_parameters(model, family_of(model.config).axes(model.config), {}) == counted(model)


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("name", ["gpt2", "bart"])
def test_axes_reach_every_dimension_that_has_their_size(tiny_gpt2, tiny_bart, name, tie):
    model = tiny(name, tiny_gpt2, tiny_bart, tie=tie)
    reached = {(id(side.parameter), side.dim) for side in sides(model, family_of(model.config).axes(model.config))}
    expected = {
        (id(parameter), dim)
        for parameter in model.parameters()
        for dim, size in enumerate(parameter.shape)
        if size in (24, 40, 72)
    }
    assert reached == expected


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(hidden=st.integers(1, 24), heads=st.integers(1, 3), ffn=st.integers(1, 40))
def test_count_of_a_uniform_size_is_that_of_the_stock_model(tiny_gpt2, tiny_bart, hidden, heads, ffn):
    kinds = {"hidden": 8 * heads, "heads": heads, "ffn": ffn}
    for name in ("gpt2", "bart"):
        model = tiny(name, tiny_gpt2, tiny_bart)
        family = family_of(model.config)
        axes = family.axes(model.config)
        sizes = {axis.name: kinds[axis.kind] for axis in axes}
        with torch.device("meta"):
            small = build(family.uniform_config(model.config, sizes))
        assert count_parameters(model, axes, sizes) == counted(small)
        assert {axis.name: axis.size for axis in sized_axes(small, family)} == sizes
        elsewhere = sizes | {"hidden": hidden}
        assert (family.uniform_config(model.config, elsewhere) is None) == (hidden != 8 * heads)


@pytest.mark.parametrize(
    ("config", "keep", "expected"),  # with final_logits_bias, 50265 numbers that the published sizes leave out
    [
        (GPT2Config(), 12, 124_439_808),
        (GPT2Config(), 10, 91_903_360),
        (GPT2Config(), 8, 64_085_504),
        (GPT2Config(), 6, 40_986_240),
        (bart_base := BartConfig(
            d_model=768, encoder_layers=6, decoder_layers=6, encoder_attention_heads=12, decoder_attention_heads=12,
            encoder_ffn_dim=3072, decoder_ffn_dim=3072
        ), 12, 139_470_681),
        (bart_base, 10, 102_471_385),
        (bart_base, 8, 70_977_113),
        (bart_base, 6, 44_987_865),
    ],
)  # fmt: skip
def test_published_sizes(config, keep, expected):
    """SIMPLE (Findings of ACL 2023), table 1: GPT-2 91.9, 64.1 and 41.0 M; BART-base likewise 102.4, 70.9, 44.9 M."""
    with torch.device("meta"):
        model = build(config)
    axes = family_of(config).axes(config)
    count = count_parameters(model, axes, {axis.name: axis.size * keep // 12 for axis in axes})
    assert count == expected


def test_count_is_exact_and_differentiable_in_tensors(model):
    axes = family_of(model.config).axes(model.config)
    whole = {axis.name: torch.tensor(float(axis.size), requires_grad=True) for axis in axes}
    total = count_parameters(model, axes, whole)
    assert total.item() == counted(model)
    total.backward()
    for axis in axes:
        up, down = (count_parameters(model, axes, {axis.name: axis.size + step}) for step in (1, -1))
        assert whole[axis.name].grad.item() == (up - down) / 2


def test_float32_would_lose_units_of_a_large_count():
    with torch.device("meta"):
        model = build(GPT2Config())
    axes = family_of(model.config).axes(model.config)
    assert count_parameters(model, axes, {"layer.0.ffn": torch.tensor(3071.0)}).item() == 124_439_808 - 1537


@pytest.mark.parametrize("name", ["gpt2", "bart"])
def test_uniform_config_of_the_own_sizes_is_the_config(tiny_gpt2, tiny_bart, name):
    config = tiny(name, tiny_gpt2, tiny_bart).config
    family = family_of(config)
    same = family.uniform_config(config, {})
    assert same is not config
    assert same.to_dict() == config.to_dict()
    assert config.to_dict() == family.uniform_config(same, {}).to_dict()


def test_uniform_config_needs_equal_layers_and_the_head_size(tiny_gpt2, tiny_bart):
    gpt2, bart = tiny_gpt2().config, tiny_bart(decoder_heads=2).config
    assert family_of(gpt2).uniform_config(gpt2, {"layer.0.ffn": 8}) is None
    assert family_of(gpt2).uniform_config(gpt2, {"layer.0.heads": 2, "layer.1.heads": 2}) is None
    assert family_of(gpt2).uniform_config(gpt2, {"hidden": 16}) is None
    small = {"hidden": 16} | {f"encoder.layer.{n}.heads": 2 for n in range(2)}
    assert family_of(bart).uniform_config(bart, small) is None
    small |= {f"decoder.layer.{n}.{heads}": 1 for n in range(2) for heads in ("heads", "cross_heads")}
    config = family_of(bart).uniform_config(bart, small)
    assert (config.d_model, config.encoder_attention_heads, config.decoder_attention_heads) == (16, 2, 1)
    assert family_of(bart).uniform_config(bart, small | {"decoder.layer.1.cross_heads": 2}) is None


@pytest.mark.parametrize(("hidden", "opens"), [(24, True), (20, False)])
def test_a_hidden_size_that_the_heads_do_not_divide_is_not_a_stock_shape(tiny_llama, hidden, opens):
    config = tiny_llama(heads=6, kv_heads=3, hidden=36).config
    sizes = {"hidden": hidden} | {f"layer.{n}.heads": 3 for n in range(2)}
    small = family_of(config).uniform_config(config, sizes)
    assert (small is not None) == opens
    if small is not None:
        assert (small.hidden_size, small.num_attention_heads, small.head_dim) == (24, 3, 6)


def test_gpt2_keeps_saying_four_times_where_it_said_so(tiny_gpt2):
    config = tiny_gpt2().config
    family = family_of(config)
    half = {"hidden": 16} | {f"layer.{n}.heads": 2 for n in range(2)}
    assert family.uniform_config(config, half | {f"layer.{n}.ffn": 64 for n in range(2)}).n_inner is None
    assert family.uniform_config(config, half).n_inner == 128


def test_head_over_final_states_gives_the_models_logits(model, tiny_inputs):
    family, inputs = family_of(model.config), tiny_inputs(model)
    out = model.get_submodule(family.body)(**inputs, output_hidden_states=True)
    assert torch.equal(family.logits(model, out[0]), model(**inputs).logits)
    assert torch.equal(getattr(out, family.final_states)[-1], out[0])
    norm = model.get_submodule(family.final_norm(model.config))
    seen = []
    norm.register_forward_hook(lambda module, args, output: seen.append(output))
    model(**inputs)
    assert torch.equal(seen[-1], out[0])


def test_embedding_scale_is_what_the_stock_embedding_multiplies_by(tiny_bart):
    for scaled in (False, True):
        model = tiny_bart(scale_embedding=scaled)
        family = family_of(model.config)
        for name in family.embeddings:
            module = model.get_submodule(name)
            expected = module.weight[5] * family.embedding_scale(model.config, model.config.d_model)
            torch.testing.assert_close(module(torch.tensor(5)), expected)


def test_attentions_name_the_projections_that_fill_the_cache(model, tiny_inputs):
    family, inputs = family_of(model.config), tiny_inputs(model)
    outputs = {}
    for attention in family.attentions(model.config):
        for projection in (attention.key, attention.value):
            model.get_submodule(projection.module).register_forward_hook(
                lambda module, args, output, name=projection.module: outputs.update({name: output})
            )
    cache = model(**inputs, use_cache=True).past_key_values
    for attention in family.attentions(model.config):
        layers = cache.layers if family.task == "causal" else None
        if family.task == "seq2seq":
            if not attention.axis.startswith("decoder"):
                assert not attention.causal
                continue
            layers = (cache.cross_attention_cache if attention.cross else cache.self_attention_cache).layers
        assert attention.causal != attention.cross
        layer = layers[int(attention.axis.split("layer.")[1].split(".")[0])]
        pairs = [(attention.value, layer.values)]
        if not any(stack.rotary for stack in family.stacks):  # rotated keys are cached, and none is rotated at 0
            pairs.append((attention.key, layer.keys))
        else:
            key = outputs[attention.key.module][:, 0]
            torch.testing.assert_close(key, layer.keys.transpose(1, 2).flatten(2)[:, 0])
        for projection, kept in pairs:
            part = outputs[projection.module].chunk(projection.blocks, dim=-1)[projection.block]
            assert torch.equal(part, kept.transpose(1, 2).flatten(2))


def test_stock_tensors_come_once(model):
    assert sum(tensor.numel() for tensor in stock_tensors(model)) == counted(model)


def test_channels_of_fused_parts():
    slot = Slot("attention", "out", width=2, blocks=3)
    assert slot.channels(torch.tensor([0, 2]), 3).tolist() == [0, 1, 4, 5, 6, 7, 10, 11, 12, 13, 16, 17]
    spread = slot.spread(torch.tensor([1.0, 0.0, 1.0]))
    assert spread.nonzero().flatten().tolist() == slot.channels(torch.tensor([0, 2]), 3).tolist()


def test_other_models_are_refused_with_those_supported():
    with pytest.raises(ModelError, match="'opt' is not supported; supported: gpt2, bart, mbart, llama"):
        family_of(OPTConfig())
    with pytest.raises(ModelError, match="add_cross_attention"):
        family_of(GPT2Config()).axes(GPT2Config(add_cross_attention=True))
