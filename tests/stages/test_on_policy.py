"""Steps on the student's own answers: which steps, which tokens are scored, and that they resume bit for bit."""

from __future__ import annotations

import json
import signal
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from compress.artifact import Artifact, adopt
from compress.errors import NothingDoneError
from compress.generation.on_policy import OnPolicy, StudentResponses
from compress.registry import STAGES
from compress.training.objective import Objective

FAMILIES = ["tiny_gpt2", "tiny_bart", "tiny_mbart", "tiny_llama"]
SIZES = {"layers": 1, "hidden": 16, "ffn": 32, "vocab": 23}
TRAIN = {"steps": 6, "batch": 4, "lr": 1e-2, "precision": "fp32", "eval_every": 3, "keep": "last", "dropout": 0.2}


def stage(terms: Any = ("forward_kl",), train: Any = None, **own: Any) -> dict[str, Any]:
    own = {"max_new_tokens": 5} | own
    return {
        "type": "distill",
        "teacher": "base",
        "terms": list(terms),
        "train": TRAIN | (train or {}),
        "on_policy": own,
    }


def history(artifact: Artifact) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (artifact.path / "history.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


@pytest.fixture
def drawing(answered: Any) -> Any:
    def make(artifact: Artifact, **own: Any) -> tuple[StudentResponses, Any]:
        data = answered(artifact).train
        config = OnPolicy(**{"fraction": 1.0, "max_new_tokens": 5, **own})
        return config.responses(artifact, artifact.model(), data, 0, "fp32"), data

    return make


@pytest.fixture
def pair(request: Any, stock: Any) -> Any:
    def make(family: str) -> tuple[Artifact, Artifact]:
        tiny = request.getfixturevalue(family)
        return stock(tiny(**SIZES), "student"), stock(tiny(**SIZES, seed=1), "teacher")

    return make


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_interrupted_and_resumed_is_straight(
    family: str, pair: Any, run_stage: Any, answered: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = pair(family)
    settings = {"data": answered(student), "models": {"base": teacher}}
    config = stage(train={"accumulate": 2}, fraction=0.6)
    straight = run_stage(config, student, out="straight", **settings)
    own = [line["on_policy"] for line in history(straight)]
    assert 0 < sum(own) < 6 and any(own[4:])
    assert straight.manifest.lineage[-1].metrics["on_policy_steps"] == sum(own)
    calls, original = {"n": 0}, Objective.forward

    def interrupted(self: Objective, batch: Any) -> Any:
        calls["n"] += 1
        if calls["n"] == 8:
            signal.raise_signal(signal.SIGINT)
        return original(self, batch)

    monkeypatch.setattr(Objective, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_stage(config, student, out="resumed", **settings)
    resumed = run_stage(config, student, out="resumed", **settings)
    assert calls["n"] == 12
    assert resumed.digest == straight.digest
    assert [line["on_policy"] for line in history(resumed)] == own
    assert "on_policy" not in history(run_stage(without(config), student, out="without", **settings))[0]


def without(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != "on_policy"}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_that_is_its_teacher_is_at_distance_zero(
    family: str, pair: Any, run_stage: Any, answered: Any
) -> None:
    student, teacher = pair(family)
    data = answered(student)
    config = stage(["forward_kl", "jensen_shannon"], {"steps": 1, "dropout": 0}, fraction=1.0)
    same = history(run_stage(config, student, data=data, models={"base": student}, out="same"))[0]
    other = history(run_stage(config, student, data=data, models={"base": teacher}, out="other"))[0]
    assert all(abs(value) < 1e-6 for value in same["terms"].values())
    assert all(value > 1e-3 for value in other["terms"].values())


def test_an_answer_that_was_cut_is_not_given_the_end_that_the_model_forces(pair: Any, drawing: Any) -> None:
    student, _ = pair("tiny_bart")
    file = student.path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"forced_eos_token_id": 2}))
    drawn, data = drawing(adopt(student.path))
    labels = drawn.batch(next(iter(data.loader(14))), 0, 0)["labels"]
    lasts = labels[(labels != -100).all(1), -1]  # of answers with all five tokens
    assert labels.shape[1] == 5 and len(lasts) and (lasts != 2).any()


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_take_the_place_of_the_data_s_and_end_where_they_end(
    family: str, pair: Any, drawing: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, _ = pair(family)
    drawn, data = drawing(student)
    end = student.config().eos_token_id
    said = [[7, end], [8, 9, 10, 11, 12], [end], [9, 8, end]]
    monkeypatch.setattr(type(drawn.student), "complete", lambda *_: said)
    before = next(iter(data.loader(4, shuffle=True)))
    batch = drawn.batch(before, 0, 0)
    scored = batch["labels"] != -100
    assert [row[mask].tolist() for row, mask in zip(batch["labels"], scored, strict=True)] == said
    assert int(scored.sum()) == sum(map(len, said))
    seq2seq = "bart" in family
    for i, answer in enumerate(said):
        length = int(batch["attention_mask"][i].sum())
        if seq2seq:
            assert torch.equal(batch["input_ids"], before["input_ids"])
            assert batch["decoder_input_ids"][i, : len(answer)].tolist() == [2, *answer[:-1]]
            assert int(batch["decoder_attention_mask"][i].sum()) == len(answer)
        else:
            prompt = int((before["labels"][i] != -100).int().argmax()) + 1
            assert length == prompt + len(answer) - 1
            expected = [*before["input_ids"][i, :prompt].tolist(), *answer[:-1]]
            assert batch["input_ids"][i, :length].tolist() == expected


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_drawn_follows_from_seed_step_and_part_alone(family: str, pair: Any, drawing: Any) -> None:
    student, _ = pair(family)
    drawn, data = drawing(student)
    batch = next(iter(data.loader(4)))
    first, state = drawn.batch(batch, 3, 0)["labels"], torch.get_rng_state()
    torch.manual_seed(99)
    drawn.student.side.model.train()  # dropout, if it were on, would change what is drawn
    again = drawn.batch(batch, 3, 0)["labels"]
    assert drawn.student.side.model.training
    assert torch.equal(first, again)
    torch.set_rng_state(state)
    drawn.batch(batch, 4, 0)
    assert torch.equal(torch.get_rng_state(), state)  # training's own draws go on as they would
    others = [drawn.batch(batch, *at)["labels"] for at in ((4, 0), (3, 1))]
    assert not any(first.shape == other.shape and torch.equal(first, other) for other in others)
    assert all(parameter.grad is None for parameter in drawn.student.side.model.parameters())


@pytest.mark.slow
def test_answers_are_drawn_from_the_student_s_own_distribution(pair: Any, drawing: Any) -> None:
    student, _ = pair("tiny_gpt2")
    drawn, _ = drawing(student, max_new_tokens=1, temperature=0.3)
    prompt = torch.tensor([[4, 5, 6]]).expand(2000, 3)
    labels = torch.tensor([[-100, -100, 7]]).expand(2000, 3)
    batch = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt), "labels": labels}
    found = drawn.batch(batch, 0, 0)["labels"][:, -1]
    shares = torch.bincount(found, minlength=23) / 2000
    with torch.no_grad():
        logits = drawn.student.side.model(prompt[:1]).logits[0, -1]
    assert (shares - F.softmax(logits / 0.3, -1)).abs().max() < 0.03
    assert (shares - F.softmax(logits, -1)).abs().max() > 0.05  # another temperature would show
    only = drawing(student, max_new_tokens=1, top_k=1)[0].batch(batch, 0, 0)["labels"][:, -1]
    assert set(only.tolist()) == {int(logits.argmax())}


@pytest.mark.slow
def test_the_share_of_steps_is_the_fraction_and_the_first_choices_do_not_depend_on_how_many(
    pair: Any, drawing: Any
) -> None:
    student, _ = pair("tiny_gpt2")
    drawn, _ = drawing(student, fraction=0.3)
    chosen = [drawn.chosen(step) for step in range(3000)]
    assert abs(sum(chosen) / 3000 - 0.3) < 0.03
    assert chosen[:50] == [drawn.chosen(step) for step in range(50)]
    assert all(drawing(student, fraction=1.0)[0].chosen(step) for step in range(100))


def test_a_run_in_which_no_step_is_chosen_is_refused(pair: Any, run_stage: Any, answered: Any) -> None:
    student, teacher = pair("tiny_gpt2")
    with pytest.raises(NothingDoneError, match="distill: on_policy chose none of 2 steps; raise its fraction"):
        config = stage(train={"steps": 2}, fraction=1e-6)
        run_stage(config, student, data=answered(student), models={"base": teacher})


@pytest.mark.slow
def test_the_student_s_generation_settings_stay_its_own(pair: Any, run_stage: Any, answered: Any) -> None:
    student, teacher = pair("tiny_bart")
    (student.path / "generation_config.json").unlink()  # or the source's would be copied
    config = stage(train={"steps": 1}, fraction=1.0)
    made = run_stage(config, student, data=answered(student), models={"base": teacher})
    written = json.loads((made.path / "generation_config.json").read_text())
    assert "max_new_tokens" not in written and not written.get("do_sample")


def test_what_needs_the_data_s_own_rows_is_refused(pair: Any, shape_of: Any) -> None:
    student, teacher = pair("tiny_gpt2")
    shapes = shape_of(student, "student", root="base"), shape_of(teacher, "base")

    def problem(*terms: Any, **more: Any) -> str:
        return "".join(map(str, STAGES.read(stage(terms) | more).problems(*shapes)))

    message = "terms[1]: cross_entropy scores the tokens of the data, but on_policy replaces them"
    assert problem("forward_kl", "cross_entropy") == message
    bank = {"type": "token_contrastive", "bank": "position"}
    message = "terms[0]: token_contrastive stores values for each row of the data, but on_policy replaces rows"
    assert problem(bank) == message
    assert not problem({"type": "token_contrastive"}) and not problem("forward_kl", targets="kd")
    unread = problem("forward_kl", targets="kd", on_policy={"fraction": 1})
    assert unread == "targets: 'kd' would not be read, because on_policy.fraction is 1"
    with pytest.raises(ValueError, match="no step would use the student's own responses; leave on_policy out"):
        STAGES.read(stage(fraction=0))
