"""Distillation: students approach their teachers, and teachers that cannot serve are refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from compress.artifact import adopt
from compress.errors import ModelError
from compress.problem import Problem
from compress.registry import STAGES

TRAIN = {"steps": 20, "batch": 8, "lr": 1e-2, "precision": "fp32", "eval_every": 10, "keep": "last", "dropout": 0}
FAMILIES = ["tiny_gpt2", "tiny_bart", "tiny_mbart", "tiny_llama"]


def stage(*terms: Any, **train: Any) -> dict[str, Any]:
    return {"type": "distill", "teacher": "base", "train": TRAIN | train} | ({"terms": terms} if terms else {})


def tiny(request: Any, family: str, **options: Any) -> Any:
    return request.getfixturevalue(family)(**{"layers": 1, "hidden": 16, "ffn": 32, "vocab": 23, **options})


def curve(artifact: Any, name: str) -> list[float]:
    lines = [json.loads(line) for line in (artifact.path / "history.jsonl").read_text().splitlines()]
    return [line["terms"][name] for line in lines if "terms" in line]


@pytest.fixture
def pruned(request: Any, stock: Any, run_stage: Any) -> Any:
    """A base and what is left of it when half of everything is cut."""

    def make(family: str) -> tuple[Any, Any]:
        base = stock(tiny(request, family))
        masks = run_stage({"type": "learn_masks", "method": "magnitude"}, base, out="masks")
        return base, run_stage({"type": "prune", "keep": "2/4"}, masks, out="cut")

    return make


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("term", ["forward_kl", "causal_kv", "hidden_mse", "attention_relation"])
def test_a_cut_student_approaches_its_root(term: str, family: str, pruned: Any, learnable: Any, run_stage: Any) -> None:
    base, cut = pruned(family)
    config = stage({"type": term} | ({"heads": 2} if term == "attention_relation" else {}), lr=5e-3)
    made = run_stage(config, cut, data=learnable(base), models={"base": base}, out="made")
    values = curve(made, term)
    assert sum(values[-4:]) < 0.9 * sum(values[:4])
    assert made.manifest.kept == cut.manifest.kept and made.traits == {"pruned"}
    assert made.manifest.root == base.digest


@pytest.mark.slow
def test_adaptive_kl_is_the_default_and_a_narrower_student_of_another_model_learns(
    request: Any, stock: Any, learnable: Any, run_stage: Any
) -> None:
    teacher = stock(tiny(request, "tiny_gpt2", hidden=32, seed=1), "teacher")
    student = stock(tiny(request, "tiny_gpt2"), "student")
    made = run_stage(stage(), student, data=learnable(student), models={"base": teacher})
    values = curve(made, "adaptive_kl")
    assert sum(values[-4:]) < 0.7 * sum(values[:4])
    assert made.manifest.root == student.digest


@pytest.mark.slow
def test_two_runs_of_a_seed_give_one_digest(pruned: Any, learnable: Any, run_stage: Any) -> None:
    base, cut = pruned("tiny_gpt2")
    data = learnable(base)
    config = stage("forward_kl", {"type": "token_contrastive", "size": 8}, steps=4, dropout=0.1)
    digests = {run_stage(config, cut, data=data, models={"base": base}, out=out).digest for out in ("one", "two")}
    assert len(digests) == 1


@pytest.mark.slow
def test_the_teacher_stays_as_it_was(pruned: Any, learnable: Any, run_stage: Any) -> None:
    base, cut = pruned("tiny_gpt2")
    run_stage(stage(steps=2), cut, data=learnable(base), models={"base": base}, out="made")
    assert adopt(base.path).digest == base.digest


@pytest.mark.slow
@pytest.mark.parametrize("term", ["causal_kv", "hidden_mse"])
def test_unit_by_unit_terms_need_an_ancestor_with_every_unit(
    term: str, request: Any, pruned: Any, stock: Any, learnable: Any, run_stage: Any, shape_of: Any
) -> None:
    base, cut = pruned("tiny_gpt2")
    stranger = stock(tiny(request, "tiny_gpt2", seed=1), "stranger")
    data = learnable(base)
    for teacher in (stranger, cut):
        with pytest.raises(ModelError, match=f"{term}: the teacher is not the model the student was cut from"):
            run_stage(stage(term, steps=1), cut, data=data, models={"base": teacher}, out="refused")
    read, student = STAGES.read(stage(term)), shape_of(cut, "cut", root="base")
    refused = [shape_of(stranger, "stranger"), shape_of(cut, "cut", root="base")]
    for shape in refused:
        (problem,) = read.problems(student, shape)
        assert str(problem).startswith(f"terms[0]: {term} compares unit by unit, so the teacher must be 'base'")
    taught = run_stage(
        {"type": "finetune", "train": {k: v for k, v in TRAIN.items() if k != "steps"} | {"steps": 1}},
        base,
        data=data,
        out="taught",
    )
    assert not list(read.problems(student, shape_of(taught, "taught", root="base")))
    run_stage(stage(term, steps=1), cut, data=data, models={"base": taught}, out="made")


def test_vocabularies_must_agree(request: Any, stock: Any, shape_of: Any) -> None:
    student = shape_of(stock(tiny(request, "tiny_gpt2"), "student"), "student")
    teacher = shape_of(stock(tiny(request, "tiny_gpt2", vocab=29), "teacher"), "teacher")
    (problem,) = STAGES.read(stage()).problems(student, teacher)
    assert problem == Problem(
        ("teacher",),
        "'teacher' has a vocabulary of 29 tokens, but the student 'student' has 23; they must use the same vocabulary",
    )
    problem = next(STAGES.read(stage()).problems(student, None))
    assert str(problem) == "terms[0]: adaptive_kl needs a teacher; name one with teacher: NAME"


@pytest.mark.slow
@pytest.mark.parametrize("quant_type", ["nf4", "int8"])
def test_a_teacher_of_bitsandbytes_is_read_where_it_is(
    quant_type: str, request: Any, stock: Any, learnable: Any, run_stage: Any
) -> None:
    base = stock(tiny(request, "tiny_gpt2", hidden=64, ffn=128))
    teacher = run_stage({"type": "bitsandbytes", "quant_type": quant_type}, base, out="teacher")
    made = run_stage(stage("forward_kl"), base, data=learnable(base), models={"base": teacher}, out="made")
    assert all(value > 0 for value in curve(made, "forward_kl"))
