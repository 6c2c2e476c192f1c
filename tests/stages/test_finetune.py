"""Fine-tuning: it learns, hands on the best weights, repeats itself, and survives an interruption."""

from __future__ import annotations

import json
import signal
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from compress.errors import DataError
from compress.registry import STAGES
from compress.stages.stage import Context
from compress.training.forward import Side, nll
from compress.training.objective import Objective

TRAIN = {"steps": 20, "batch": 8, "lr": 1e-2, "precision": "fp32", "eval_every": 5}
FAMILIES = ["tiny_gpt2", "tiny_bart", "tiny_mbart", "tiny_llama"]


def stage(**train: Any) -> dict[str, Any]:
    return {"type": "finetune", "train": TRAIN | train}


def tiny(request: Any, family: str, **options: Any) -> Any:
    return request.getfixturevalue(family)(**{"layers": 1, "hidden": 16, "ffn": 32, "vocab": 23, **options})


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_falls_and_the_best_model_is_handed_on(
    family: str, request: Any, stock: Any, learnable: Any, run_stage: Any
) -> None:
    base = stock(tiny(request, family))
    data = learnable(base)
    made = run_stage(stage(), base, data=data)
    lines = [json.loads(line) for line in (made.path / "history.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 20 and sum(losses[-4:]) < 0.7 * sum(losses[:4])
    step = made.manifest.lineage[-1]
    assert step.metrics["eval_nll"] == min(line["eval_nll"] for line in lines if "eval_nll" in line)
    model = made.model()
    totals = [nll(Side(model, made.family()), batch) for batch in data.eval.loader(8)]
    assert sum(value for value, _ in totals) / sum(count for _, count in totals) == pytest.approx(
        step.metrics["eval_nll"], rel=1e-5
    )
    assert step.coverage["parameters_touched"] == step.coverage["parameters_total"]
    assert made.traits == set() and made.manifest.root == base.digest


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_one_seed_gives_one_digest_interrupted_or_not(
    family: str, request: Any, stock: Any, learnable: Any, run_stage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = stock(tiny(request, family))
    data, config = learnable(base), stage(steps=6, eval_every=2, checkpoint_every=2, precision="bf16")
    straight = run_stage(config, base, data=data, out="straight")
    calls, original = {"n": 0}, Objective.forward

    def interrupted(self: Objective, batch: Any) -> Any:
        calls["n"] += 1
        if calls["n"] == 3:
            signal.raise_signal(signal.SIGINT)
        return original(self, batch)

    monkeypatch.setattr(Objective, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_stage(config, base, data=data, out="resumed")
    resumed = run_stage(config, base, data=data, out="resumed")
    assert calls["n"] == 6  # three steps before the interruption, three after it
    assert resumed.digest == straight.digest
    other = run_stage(config, base, data=data, out="other", seed=1)
    assert other.digest not in (straight.digest, base.digest)


@pytest.mark.slow
def test_a_cut_model_keeps_its_shape_and_its_units(
    request: Any, stock: Any, learnable: Any, run_stage: Any, tmp_path: Any
) -> None:
    base = stock(tiny(request, "tiny_gpt2"))
    masks = run_stage({"type": "learn_masks", "method": "magnitude"}, base, out="masks")
    cut = run_stage({"type": "prune", "keep": {"heads": "3/4"}}, masks, out="cut")
    made = run_stage(stage(steps=2), cut, data=learnable(base), out="trained")
    assert made.traits == {"pruned"} and made.manifest.kept == cut.manifest.kept and made.sizes() == cut.sizes()
    trained, pruned = (each.manifest.lineage[-1].coverage for each in (made, cut))
    assert trained["bytes_before"] == trained["bytes_after"] == pruned["bytes_after"]  # the same tensors are counted
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        assert not torch.equal(made.model()(ids).logits, cut.model()(ids).logits)


def test_steps_must_be_some() -> None:
    with pytest.raises(ValidationError, match="steps is 0, but this stage only trains"):
        STAGES.read(stage(steps=0))


def test_terms_that_need_more_than_data_are_refused(request: Any, stock: Any, shape_of: Any) -> None:
    with pytest.raises(ValidationError, match="forward_kl needs a teacher; use a distill stage"):
        STAGES.read(stage() | {"terms": ["forward_kl"]})
    shape = shape_of(stock(tiny(request, "tiny_gpt2")))
    assert list(STAGES.read(stage()).problems(shape, None)) == []
    masks = "terms[0]: mask_l1 needs trainable masks, which only learn_masks has"
    for terms, message in (([], "terms: is empty"), (["mask_l1"], masks)):
        found = list(STAGES.read(stage() | {"terms": terms}).problems(shape, None))
        assert len(found) == 1 and str(found[0]).startswith(message)


def test_without_data_nothing_starts(request: Any, stock: Any, tmp_path: Any) -> None:
    base = stock(tiny(request, "tiny_gpt2"))
    with pytest.raises(DataError, match=r"finetune: trains, but the recipe has no data\.train"):
        STAGES.read(stage()).run(base, tmp_path, Context({}))
