"""State terms against plain computations on what the stock models themselves hand out."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from compress.errors import ModelError
from compress.models import family_of
from compress.models.cache import from_cache
from compress.surgery.cut import cut
from compress.surgery.layers import drop
from compress.surgery.masks import attach
from compress.terms.attention_relation import AttentionRelation
from compress.terms.causal_kv import CausalKV
from compress.terms.hidden_mse import HiddenMSE
from compress.terms.mask_l1 import MaskL1
from compress.training.objective import Objective


def _outputs(model: Any, batch: Any) -> Any:
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    with torch.no_grad():
        return model(**inputs, use_cache=True, output_hidden_states=True)


def _mask(batch: Any) -> torch.Tensor:
    return batch.get("decoder_attention_mask", batch["attention_mask"]).bool()


@pytest.mark.parametrize("family", ["tiny_gpt2", "tiny_bart", "tiny_mbart", "tiny_llama"])
def test_causal_kv_is_the_distance_of_the_self_attention_caches(
    family: str, request: Any, side: Any, batch: Any
) -> None:
    """Equation 6 by hand; the encoder's and the cross attention's keys are not causal and do not count."""
    make = request.getfixturevalue(family)
    student, teacher = make(seed=0), make(seed=1)
    rows = batch(student)
    _, values = Objective(side(student), [CausalKV()], teacher=side(teacher))(rows)
    caches = [_outputs(model, rows).past_key_values for model in (student, teacher)]
    ours, theirs = (from_cache(getattr(cache, "self_attention_cache", cache)) for cache in caches)
    assert len(ours) == 4  # two layers of keys and values
    mask = _mask(rows)
    parts = [F.mse_loss(s.transpose(1, 2)[mask], t.transpose(1, 2)[mask]) for s, t in zip(ours, theirs, strict=True)]
    torch.testing.assert_close(values["causal_kv"], torch.stack(parts).sum() / 2, atol=1e-5, rtol=1e-5)


def test_causal_kv_of_a_cut_decoder_compares_the_heads_it_kept(tiny_bart: Any, side: Any, batch: Any) -> None:
    """Self-attention of the decoder alone, layer by layer; what the other attentions hold is nothing to it."""
    shape = {"layers": 1, "decoder_layers": 2, "heads": 2, "decoder_heads": 4}
    teacher, student = tiny_bart(seed=1, **shape), tiny_bart(seed=0, **shape)
    kept = {"decoder.layer.0.heads": [0, 3], "decoder.layer.1.heads": [2], "decoder.layer.0.cross_heads": [1]}
    kept |= {"encoder.layer.0.heads": [1], "hidden": [*range(3, 30)]}
    cut(student, side(student).family, kept)
    rows = batch(teacher)
    objective = Objective(side(student, kept), [CausalKV()], teacher=side(teacher))
    found, mask, parts = objective(rows)[1]["causal_kv"], _mask(rows), []
    for layer in range(2):
        heads = kept[f"decoder.layer.{layer}.heads"]
        for ours, theirs in list(zip(_qkv(student, rows, layer), _qkv(teacher, rows, layer), strict=True))[1:]:
            parts.append(F.mse_loss(ours[mask], theirs[mask].unflatten(-1, (4, 8))[:, heads].flatten(1)))
    torch.testing.assert_close(found, 2 * torch.stack(parts).mean(), atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        for layer in (*teacher.model.encoder.layers, *(each.encoder_attn for each in teacher.model.decoder.layers)):
            (layer if hasattr(layer, "k_proj") else layer.self_attn).k_proj.bias.add_(5.0)  # which softmax ignores
    torch.testing.assert_close(objective(rows)[1]["causal_kv"], found, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layers", ["all", "last"])
@pytest.mark.parametrize("family", ["tiny_gpt2", "tiny_bart", "tiny_mbart", "tiny_llama"])
def test_hidden_mse_compares_kept_units_of_the_decoder(
    family: str, layers: Any, request: Any, side: Any, batch: Any
) -> None:
    make = request.getfixturevalue(family)
    student, teacher = make(seed=0), make(seed=1)
    kept = {"hidden": [1, *range(4, 30, 2)]}
    cut(student, side(student).family, kept)
    rows = batch(teacher)
    objective = Objective(side(student, kept), [HiddenMSE(layers=layers)], teacher=side(teacher))
    found = objective(rows)[1]["hidden_mse"]
    name, mask = ("decoder_hidden_states" if "bart" in family else "hidden_states"), _mask(rows)
    ours, theirs = (getattr(_outputs(model, rows), name) for model in (student, teacher))
    parts = [F.mse_loss(s[mask], t[mask][:, kept["hidden"]]) for s, t in zip(ours, theirs, strict=True)]
    expected = parts[-1] if layers == "last" else torch.stack(parts).mean()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["tiny_gpt2", "tiny_bart", "tiny_mbart", "tiny_llama"])
def test_attention_relation_of_a_narrower_student(family: str, request: Any, side: Any, batch: Any) -> None:
    """MiniLMv2 by hand, from the caches: keys and values give two of the three relations; queries need the rest."""
    make = request.getfixturevalue(family)
    groups = {"kv_heads": 1} if family == "tiny_llama" else {}
    student, teacher = make(seed=0, hidden=16, heads=2, **groups), make(seed=1)
    rows = batch(teacher)
    objective = Objective(side(student), [AttentionRelation(heads=2, layer=0)], teacher=side(teacher))
    found = objective(rows)[1]["attention_relation"]
    mask, total = _mask(rows), torch.zeros((), dtype=torch.float64)
    views = [_qkv(model, rows, layer) for model, layer in ((student, 1), (teacher, 0))]
    for ours, theirs in zip(*views, strict=True):
        for b, real in enumerate(mask):
            logs = []
            for x in (ours[b].double(), theirs[b].double()):
                heads = x.unflatten(-1, (2, -1)).transpose(0, 1)
                scores = heads @ heads.transpose(1, 2) / heads.shape[-1] ** 0.5
                seen = real[None] & torch.ones(len(real), len(real), dtype=torch.bool).tril()
                logs.append(scores.masked_fill(~seen, -torch.inf)[:, real][:, :, real].log_softmax(-1))
            q, p = logs
            total += (p.exp() * (p - q)).where(p > -torch.inf, 0.0).sum()
    torch.testing.assert_close(found.double(), total / (2 * mask.sum()), atol=1e-4, rtol=1e-4)


def _qkv(model: Any, batch: Any, layer: int) -> tuple[torch.Tensor, ...]:
    caught: dict[str, torch.Tensor] = {}
    fused = hasattr(model, "transformer")
    stack = model.transformer.h if fused else getattr(model.model, "decoder", model.model).layers
    block = stack[layer].attn if fused else stack[layer].self_attn
    names = ("c_attn",) if fused else ("q_proj", "k_proj", "v_proj")
    handles = [
        getattr(block, name).register_forward_hook(lambda _m, _i, out, name=name: caught.__setitem__(name, out))
        for name in names
    ]
    _outputs(model, batch)
    for handle in handles:
        handle.remove()
    return caught["c_attn"].chunk(3, dim=-1) if fused else tuple(caught[name] for name in names)


def test_attention_relation_names_what_does_not_fit(tiny_gpt2: Any, side: Any, batch: Any) -> None:
    student = tiny_gpt2()
    for options, message in (
        ({"heads": 2, "layer": 2}, r"attention_relation\.layer: the teacher has no layer 2; allowed: -2 to 1"),
        ({"heads": 5}, r"attention_relation\.heads: 5 does not divide 32"),
    ):
        objective = Objective(side(student), [AttentionRelation(**options)], teacher=side(tiny_gpt2(seed=1)))
        with pytest.raises(ModelError, match=message):
            objective(batch(student))


@pytest.mark.parametrize("term", [CausalKV(), HiddenMSE()])
def test_unit_by_unit_terms_need_as_many_layers(term: Any, tiny_gpt2: Any, side: Any, batch: Any) -> None:
    student = tiny_gpt2(layers=1)
    message = f"{term.type} needs as many layers in the teacher as in the student: the teacher has 2, the student 1"
    with pytest.raises(ModelError, match=message):
        Objective(side(student), [term], teacher=side(tiny_gpt2()))(batch(student))


def _handing_on(module: Any, args: Any, output: Any) -> Any:
    return (args[0], *output[1:]) if isinstance(output, tuple) else args[0]


@pytest.mark.parametrize("kept", [[0, 2, 5], [1, 4], [0, 1, 3]])
@pytest.mark.parametrize("family", ["tiny_gpt2", "tiny_bart", "tiny_mbart", "tiny_llama"])
def test_layers_are_compared_with_those_they_came_from(
    kept: list[int], family: str, request: Any, side: Any, batch: Any
) -> None:
    """A teacher that skips the layers its copy lacks is at distance 0, by the right map and by no other."""
    teacher = request.getfixturevalue(family)(layers=6, hidden=16)
    student, table = copy.deepcopy(teacher), family_of(teacher.config)
    drop(student, table, {"decoder": kept})
    layers = teacher.get_submodule(table.stacks[-1].layers)
    for n in set(range(6)) - set(kept):
        layers[n].register_forward_hook(_handing_on)
    heads = f"{table.stacks[-1].axes}.{len(kept) - 1}.heads"
    cut(student, table, {heads: [1, 3]})  # of the last layer, whose own keys and values do not depend on them
    rows = batch(teacher)
    for wrong in (None, [0, 1, 2][: len(kept)], [5 - n for n in reversed(kept)]):
        ours = side(student, {heads: [1, 3]}, {"decoder": wrong or kept})
        value = Objective(ours, [CausalKV()], teacher=side(teacher))(rows)[1]["causal_kv"].item()
        assert value < 1e-10 if wrong in (None, kept) else value > 1e-3


@pytest.mark.parametrize("layers", ["all", "last"])
@pytest.mark.parametrize("kept", [[0, 2, 5], [1, 4], [0, 1, 3]])
@pytest.mark.parametrize("family", ["tiny_gpt2", "tiny_bart", "tiny_mbart", "tiny_llama"])
def test_states_are_compared_with_those_of_the_same_layer(
    kept: list[int], family: str, layers: Any, request: Any, side: Any, batch: Any
) -> None:
    """Also where the teacher's last layer is gone, and what its final normalization reads comes from another."""
    teacher = request.getfixturevalue(family)(layers=6, hidden=16)
    student, table = copy.deepcopy(teacher), family_of(teacher.config)
    drop(student, table, {"decoder": kept})
    stack = teacher.get_submodule(table.stacks[-1].layers)
    for n in set(range(6)) - set(kept):
        stack[n].register_forward_hook(_handing_on)
    rows = batch(teacher)
    for wrong in (None, [0, 3, 4][: len(kept)]):
        ours = side(student, layers={"decoder": wrong or kept})
        value = Objective(ours, [HiddenMSE(layers=layers)], teacher=side(teacher))(rows)[1]["hidden_mse"].item()
        assert value < 1e-10 if wrong is None or layers == "last" else value > 1e-3


def test_a_teacher_may_have_lost_layers_too(tiny_gpt2: Any, side: Any, batch: Any) -> None:
    """Both maps count layers of the root."""
    root = tiny_gpt2(layers=6)
    teacher, student = copy.deepcopy(root), copy.deepcopy(root)
    drop(teacher, side(root).family, {"decoder": [0, 2, 3, 5]})
    drop(student, side(root).family, {"decoder": [0, 2, 5]})
    rows = batch(root)
    wanted = [_qkv(teacher, rows, layer) for layer in (0, 1, 3)]
    parts = [
        F.mse_loss(s[_mask(rows)], t[_mask(rows)])
        for n, qkv in enumerate(wanted)
        for s, t in zip(_qkv(student, rows, n)[1:], qkv[1:], strict=True)
    ]
    ours, theirs = side(student, layers={"decoder": [0, 2, 5]}), side(teacher, layers={"decoder": [0, 2, 3, 5]})
    found = Objective(ours, [CausalKV()], teacher=theirs)(rows)[1]["causal_kv"]
    torch.testing.assert_close(found, 2 * torch.stack(parts).mean())
    for term in (CausalKV(), HiddenMSE()):
        message = f"{term.type} compares layer by layer, and the teacher lacks layers 1, 4 of the model"
        with pytest.raises(ModelError, match=message):
            Objective(side(root), [term], teacher=theirs)(rows)


def test_mask_l1_sums_over_every_mask(tiny_gpt2: Any, side: Any, batch: Any) -> None:
    student = tiny_gpt2()
    masks = attach(student, side(student).family, ["hidden", "heads", "ffn"])
    units = 32 + 2 * 4 + 2 * 128
    objective = Objective(side(student), [MaskL1()])
    assert objective(batch(student))[1]["mask_l1"].item() == units
    with torch.no_grad():
        masks["layer.0.heads"].copy_(torch.tensor([-2.0, 0.0, 0.5, 1.0]))
    total, values = objective(batch(student))
    assert values["mask_l1"].item() == units - 4 + 3.5
    total.backward()
    assert masks["layer.0.heads"].grad.tolist() == [-1.0, 0.0, 1.0, 1.0]
