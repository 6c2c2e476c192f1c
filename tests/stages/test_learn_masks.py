"""Masks and scores: what trains, what stays, and the same numbers as plain computations."""

from __future__ import annotations

import signal
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from safetensors.torch import load_file

from compress.artifact import MASKS
from compress.engine.masking import unit_values
from compress.errors import ModelError
from compress.models.loading import load_stock
from compress.registry import STAGES
from compress.surgery.masks import attach, masks_of
from compress.training.objective import Objective

TRAIN = {"steps": 6, "batch": 8, "mask_lr": 3e-2, "precision": "fp32", "eval_every": 1, "dropout": 0}
FAMILIES = ["tiny_gpt2", "tiny_bart", "tiny_mbart", "tiny_llama"]
L1 = {"type": "mask_l1", "weight": 1e-2}


def stage(method: str = "learned", terms: Any = None, weights_lr: Any = None, axes: Any = None, **train: Any) -> Any:
    given = {"terms": terms, "weights_lr": weights_lr, "axes": axes}
    config = {"type": "learn_masks", "method": method, "teacher": "base", "train": TRAIN | train}
    return config | {name: value for name, value in given.items() if value is not None}


@pytest.fixture
def base(request: Any, stock: Any) -> Any:
    def make(family: str = "tiny_gpt2", **options: Any) -> Any:
        settings = {"layers": 2, "hidden": 16, "ffn": 24, "vocab": 23, **options}
        return stock(request.getfixturevalue(family)(**settings))

    return make


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_masks_train_and_frozen_weights_stay_bit_for_bit(
    family: str, base: Any, learnable: Any, run_stage: Any
) -> None:
    source = base(family)
    made = run_stage(stage(), source, data=learnable(source))
    assert made.traits == {"masked"} and made.manifest.kept == {}
    weights, theirs = (load_file(place.path / "model.safetensors") for place in (made, source))
    assert all(torch.equal(weights[name], theirs[name]) for name in theirs) and set(weights) == set(theirs)
    masks = made.masks()
    expected = {axis: size for axis, size in source.sizes().items() if not axis.endswith("groups")}
    assert {axis: len(mask) for axis, mask in masks.items()} == expected
    for axis, mask in masks.items():
        assert (mask != 1).all(), axis
        assert torch.equal(mask, masks_of(made.model())[axis])
    stock_model, plain = load_stock(made.path), source.model()
    for name, tensor in plain.state_dict().items():
        assert torch.equal(stock_model.state_dict()[name], tensor)


def test_groups_are_refused_before_any_work_where_a_model_has_none(base: Any, shape_of: Any) -> None:
    read = STAGES.read({"type": "learn_masks", "method": "magnitude", "axes": ["ffn", "groups"]})
    for family, refused in (("tiny_gpt2", True), ("tiny_llama", False)):
        source = base(family)
        problems = [str(problem) for problem in read.problems(shape_of(source), None)]
        assert any("'groups' is not an axis of this model" in text for text in problems) == refused
        model = source.model()
        with pytest.raises(ModelError, match="'groups'") if refused else nullcontext():
            values, _, _ = unit_values(model, source.family(), read.axes, read.method)
            assert {axis.rpartition(".")[2] for axis in values} == {"ffn", "groups"}


def test_masks_start_at_one(base: Any, learnable: Any, run_stage: Any) -> None:
    source = base()
    made = run_stage(stage(steps=1, mask_lr=0, axes=["heads"]), source, data=learnable(source))
    assert {axis: mask.tolist() for axis, mask in made.masks().items()} == {
        f"layer.{n}.heads": [1.0] * 4 for n in range(2)
    }


@pytest.mark.slow
def test_the_penalty_shrinks_masks(base: Any, learnable: Any, run_stage: Any) -> None:
    source, sums = base(), []
    data = learnable(source)
    for i, weight in enumerate((1e-6, 1e-2, 1.0)):
        made = run_stage(stage(terms=["forward_kl", L1 | {"weight": weight}]), source, data=data, out=str(i))
        sums.append(sum(mask.abs().sum().item() for mask in made.masks().values()))
    assert sums[0] > sums[1] > sums[2]


@pytest.mark.slow
def test_the_last_masks_are_handed_on_though_the_first_evaluate_best(base: Any, learnable: Any, run_stage: Any) -> None:
    source = base()
    made = run_stage(
        stage(terms=[{"type": "mask_l1"}], steps=10, schedule="constant", warmup=0), source, data=learnable(source)
    )
    total = sum(mask.abs().sum().item() for mask in made.masks().values())
    units = sum(source.sizes().values())
    assert total == pytest.approx(units * (1 - 10 * TRAIN["mask_lr"]), rel=1e-3)  # ten steps of Adam, all downhill


@pytest.mark.slow
def test_weights_train_where_a_rate_is_given(base: Any, learnable: Any, run_stage: Any) -> None:
    source = base()
    made = run_stage(stage(weights_lr=1e-3, axes=["ffn"]), source, data=learnable(source))
    weights, theirs = (load_file(place.path / "model.safetensors") for place in (made, source))
    assert set(weights) == set(theirs)
    assert not any(torch.equal(weights[name], theirs[name]) for name in theirs)
    assert set(made.masks()) == {"layer.0.ffn", "layer.1.ffn"}


# -- scores against plain references


def _reference(source: Any, data: Any, steps: int, rate: float, **loader: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Summed |m g| and summed -m g over the batches of a run, the weights trained with plain AdamW at ``rate``."""
    model = source.model().train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "activation_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    weights = list(model.parameters())
    attach(model, source.family(), ["hidden", "heads", "ffn"])
    masks = masks_of(model)
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)
    absolute = {axis: torch.zeros_like(mask) for axis, mask in masks.items()}
    signed = {axis: torch.zeros_like(mask) for axis, mask in masks.items()}
    for batch in data.train.loader(TRAIN["batch"], seed=0, shuffle=True, steps=steps):
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        loss = F.cross_entropy(model(**inputs).logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100)
        optimizer.zero_grad()
        grads = dict(zip(masks, torch.autograd.grad(loss, list(masks.values()), retain_graph=True), strict=True))
        for axis, grad in grads.items():
            absolute[axis] += grad.abs()
            signed[axis] -= grad
        loss.backward()
        optimizer.step()
    return absolute, signed


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_aware_scores(family: str, base: Any, learnable: Any, run_stage: Any) -> None:
    """All steps count, though the unchanged model evaluates best at the first; the penalty is left out."""
    source = base(family)
    data = learnable(source)
    made = run_stage(stage("loss_aware", terms=["cross_entropy", L1]), source, data=data)
    expected, _ = _reference(source, data, 6, rate=0.0)
    for axis, scores in made.masks().items():
        torch.testing.assert_close(scores, expected[axis], atol=1e-5, rtol=1e-3)
    assert set(made.masks()) == set(expected)
    assert all((mask == 1).all() for mask in masks_of(made.model()).values())


@pytest.mark.slow
def test_movement_scores_keep_the_order_of_signed_sums(base: Any, learnable: Any, run_stage: Any) -> None:
    source = base()
    data = learnable(source)
    made = run_stage(
        stage("movement", weights_lr=1e-3, schedule="constant", warmup=0, clip=None, weight_decay=0), source, data=data
    )
    _, signed = _reference(source, data, 6, rate=1e-3)
    lowest = min(float(total.min()) for total in signed.values())
    assert lowest < 0
    for axis, scores in made.masks().items():
        assert (scores >= 0).all()
        torch.testing.assert_close(scores, signed[axis] - lowest, atol=2e-4, rtol=2e-3)
    weights, theirs = (load_file(place.path / "model.safetensors") for place in (made, source))
    assert all(torch.equal(weights[name], theirs[name]) for name in theirs)  # weights moved to be scored only


def test_magnitude_scores(base: Any, run_stage: Any) -> None:
    """A head owns its columns of query, key and value with their biases, and its rows of the output product."""
    source = base()
    made = run_stage({"type": "learn_masks", "method": "magnitude"}, source)
    scores, state, width = made.masks(), source.model().state_dict(), 4
    for n in range(2):
        layer = f"transformer.h.{n}"
        for head in range(4):
            rows = torch.arange(head * width, (head + 1) * width)
            columns = torch.cat([rows + part * 16 for part in range(3)])
            own = torch.cat(
                [
                    state[f"{layer}.attn.c_attn.weight"][:, columns].flatten(),
                    state[f"{layer}.attn.c_attn.bias"][columns],
                    state[f"{layer}.attn.c_proj.weight"][rows].flatten(),
                ]
            )
            assert scores[f"layer.{n}.heads"][head].item() == pytest.approx(own.norm().item(), rel=1e-5)
        up, down = state[f"{layer}.mlp.c_fc.weight"], state[f"{layer}.mlp.c_proj.weight"]
        own = torch.cat([up, state[f"{layer}.mlp.c_fc.bias"][None], down.T])
        torch.testing.assert_close(scores[f"layer.{n}.ffn"], own.norm(dim=0))
    hidden = torch.zeros(16)
    for name, tensor in state.items():
        if name == "lm_head.weight":
            continue  # the embedding itself
        if name.endswith(("c_attn.weight", "c_fc.weight")):
            hidden += tensor.square().sum(1)
        elif not name.endswith(("c_attn.bias", "c_fc.bias")):
            hidden += tensor.square().sum(0) if tensor.ndim == 2 else tensor.square()
    torch.testing.assert_close(scores["hidden"], hidden.sqrt())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["learned", "loss_aware", "movement"])
def test_one_seed_gives_one_digest_interrupted_or_not(
    method: str, base: Any, learnable: Any, run_stage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = base(layers=1)
    data, config = learnable(source), stage(method, weights_lr=1e-3, steps=4, dropout=0.1, checkpoint_every=1)
    straight = run_stage(config, source, data=data, out="straight")
    calls, original = {"n": 0}, Objective.forward

    def interrupted(self: Objective, batch: Any) -> Any:
        calls["n"] += 1
        if calls["n"] == 2:
            signal.raise_signal(signal.SIGINT)
        return original(self, batch)

    monkeypatch.setattr(Objective, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_stage(config, source, data=data, out="resumed")
    resumed = run_stage(config, source, data=data, out="resumed")
    assert calls["n"] == 4 and resumed.digest == straight.digest
    first, second = (load_file(place.path / MASKS) for place in (straight, resumed))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_default_terms_follow_the_method() -> None:
    kinds = {
        method: [term.type for term in STAGES.read(stage(method, weights_lr=1e-3)).terms]
        for method in ("learned", "loss_aware", "movement")
    }
    assert kinds == {
        "learned": ["forward_kl", "mask_l1"],
        "loss_aware": ["cross_entropy"],
        "movement": ["cross_entropy"],
    }


def test_what_cannot_work_is_reported_before_any_work(base: Any, shape_of: Any) -> None:
    shape = shape_of(base())
    for config, message in (
        (stage("movement"), "method movement needs weights_lr"),
        (stage(steps=0), r"method learned needs steps to train"),
        (stage(axes=[]), "axes needs at least one of hidden, heads, groups, ffn"),
        (stage(axes=["ffn", "ffn"]), "at most once"),
    ):
        with pytest.raises(ValidationError, match=message):
            STAGES.read(config)
    (problem,) = STAGES.read(stage()).problems(shape, None)
    assert str(problem) == "terms[0]: forward_kl needs a teacher; name one with teacher: NAME"
    (problem,) = STAGES.read(stage("loss_aware", terms=["mask_l1"])).problems(shape, shape)
    assert str(problem) == "terms: is empty; give at least one term"
    scored = STAGES.read(stage("loss_aware", terms=["forward_kl", "mask_l1"]))
    (problem,) = scored.problems(shape, shape)
    assert str(problem) == "terms: 'base' has distance 0 from itself, so no unit gets a score; use cross_entropy"
    assert not list(scored.problems(shape, shape_of(base(seed=1), "other")))
    assert not list(STAGES.read(stage()).problems(shape, shape))
    assert not list(STAGES.read({"type": "learn_masks", "method": "magnitude"}).problems(shape, None))
    assert STAGES.read(stage(axes=["ffn"])).shape(shape).masked == ("ffn",)
