"""Generated targets are what the stock library generates, whole after an interruption, and what a student learns."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.api import load
from compress.artifact import TARGETS, Artifact, adopt
from compress.data import Data
from compress.data.dataset import with_targets
from compress.data.targets import prompts_of
from compress.errors import DataError, ModelError, NothingDoneError
from compress.generation.settings import Generation
from compress.generation.subject import TorchSubject
from compress.registry import STAGES
from compress.training.forward import Side, nll

FAMILIES = ["tiny_gpt2", "tiny_bart", "tiny_mbart", "tiny_llama"]
SIZES = {"layers": 1, "hidden": 16, "ffn": 32, "vocab": 23}
TRAIN = {"steps": 30, "batch": 8, "lr": 1e-2, "precision": "fp32", "keep": "last", "dropout": 0}


def stage(batch: int = 4, **decoding: Any) -> dict[str, Any]:
    return {"type": "seq_kd", "name": "kd", "decoding": {"max_new_tokens": 6} | decoding, "batch": batch}


def rows_of(artifact: Artifact) -> list[dict[str, list[int]]]:
    return [json.loads(line) for line in (artifact.path / TARGETS).read_text().splitlines()]


@pytest.fixture
def teacher(request: Any, stock: Any) -> Any:
    """A model whose answers differ from source to source and from position to position."""

    def make(family: str) -> Artifact:
        model = request.getfixturevalue(family)(**SIZES, seed=3)
        if "bart" in family:  # which else repeats the token that its bias likes best
            model.final_logits_bias.zero_()
            for name, parameter in model.named_parameters():
                if "encoder_attn." in name or "embed_positions" in name:
                    parameter.data.mul_(20)
        return stock(model, "teacher")

    return make


def dividing(subject: TorchSubject, prompts: Any, decoding: Generation) -> int:
    """The first token with which, as the end, some answers end and others do not."""
    for end in range(3, SIZES["vocab"]):
        subject.ends = [end]
        ended = [answer[-1] == end for answer in subject.complete(prompts, decoding, 0)]
        if 0 < sum(ended) < len(ended):
            return end
    raise AssertionError("no token does")


@pytest.mark.slow
@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_targets_are_what_the_stock_library_generates(
    family: str, num_beams: int, teacher: Any, run_stage: Any, answered: Any
) -> None:
    base = teacher(family)
    data = answered(base)
    model: Any = load(base.path)
    end = dividing(
        TorchSubject.of(base, "cpu"), prompts_of(data.train), Generation(max_new_tokens=6, num_beams=num_beams)
    )
    settings = json.loads((base.path / "generation_config.json").read_text())
    (base.path / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": end}))
    kd = run_stage(stage(num_beams=num_beams), adopt(base.path), data=data)
    rows = rows_of(kd)
    assert [row["source"] for row in rows] == prompts_of(data.train)
    ended = 0
    for row in rows:
        ids = torch.tensor([row["source"]])
        options = {
            "num_beams": num_beams,
            "max_new_tokens": 6,
            "do_sample": False,
            "pad_token_id": 1,
            "eos_token_id": end,
        }
        found = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0].tolist()
        found = found[1 if "bart" in family else len(row["source"]) :]
        assert row["target"] == found
        ended += row["target"][-1] == end
    assert 0 < ended < len(rows)
    metrics = kd.manifest.lineage[-1].metrics
    assert metrics["rows"] == len(rows) and metrics["tokens"] == sum(len(row["target"]) for row in rows)
    assert metrics["without_end"] == len(rows) - ended
    assert kd.traits == {"targets"} and not list(kd.path.glob("*.safetensors"))
    with pytest.raises(ModelError, match="contains generated targets, not a model"):
        kd.model()


@pytest.mark.slow
def test_an_answer_that_was_cut_has_no_end_where_the_model_forces_one(
    teacher: Any, run_stage: Any, answered: Any
) -> None:
    base = teacher("tiny_bart")
    plain = run_stage(stage(), base, data=answered(base), out="plain")
    forcing = forcing_the_end(base)
    kd = run_stage(stage(), forcing, data=answered(forcing), out="forcing")
    cut = sum(row["target"][-1] != 2 for row in rows_of(kd))
    assert cut and kd.manifest.lineage[-1].metrics["without_end"] == cut
    assert rows_of(kd) == rows_of(plain)
    prompts = prompts_of(answered(forcing).train)  # a measurement generates as the model does on its own
    said = TorchSubject.of(forcing, "cpu").generate(prompts, Generation(max_new_tokens=6), 0)
    assert max(map(len, said)) == 5


def test_a_forced_first_token_stays(teacher: Any, answered: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    base = teacher("tiny_bart")
    forced = {"forced_bos_token_id": 7, "forced_eos_token_id": 2}  # not every transformers reads the first of a config
    monkeypatch.setattr("compress.generation.settings.forced_tokens", lambda config: forced)
    said = TorchSubject.of(base, "cpu").complete(prompts_of(answered(base).train), Generation(max_new_tokens=6), 0)
    assert {answer[0] for answer in said} == {7} and any(answer[-1] != 2 for answer in said)


def forcing_the_end(artifact: Artifact) -> Artifact:
    """The same model with the settings of a stock BART, of which every answer ends with the end token."""
    file = artifact.path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"forced_eos_token_id": 2}))
    return adopt(artifact.path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "decoding", [{"num_beams": 2}, {"do_sample": True, "temperature": 1.5}], ids=["search", "drawn"]
)
@pytest.mark.parametrize("damage", ["", "[[1, 2"], ids=["stopped", "killed"])
def test_resumed_is_straight(
    decoding: Any,
    damage: str,
    teacher: Any,
    run_stage: Any,
    answered: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = teacher("tiny_bart")
    data = answered(base)
    straight = run_stage(stage(**decoding), base, data=data, out="straight")
    calls, original = [], TorchSubject.complete

    def interrupted(self: TorchSubject, prompts: Any, *rest: Any) -> Any:
        calls.append(len(prompts))
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return original(self, prompts, *rest)

    monkeypatch.setattr(TorchSubject, "complete", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_stage(stage(**decoding), base, data=data, out="resumed")
    with (tmp_path / ".partial-resumed/checkpoints/responses.jsonl").open("a") as file:
        file.write(damage)
    resumed = run_stage(stage(**decoding), base, data=data, out="resumed")
    assert calls == [4, 4, 4, 2]  # nothing is answered twice
    assert (resumed.path / TARGETS).read_bytes() == (straight.path / TARGETS).read_bytes()
    assert resumed.digest == straight.digest


@pytest.mark.slow
def test_drawn_targets_follow_the_seed(teacher: Any, run_stage: Any, answered: Any) -> None:
    base = teacher("tiny_gpt2")
    data = answered(base)
    drawn = stage(do_sample=True)
    digests = [run_stage(drawn, base, data=data, out=f"s{i}", seed=seed).digest for i, seed in enumerate((0, 0, 1))]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_become_training_rows_in_which_the_answer_alone_is_scored(
    family: str, teacher: Any, run_stage: Any, answered: Any
) -> None:
    base = teacher(family)
    data = answered(base)
    kd = run_stage(stage(), base, data=data)
    changed = with_targets(data, kd.path / TARGETS, "kd")
    assert changed.train is not None and changed.eval is data.eval
    assert len(changed.train) == len(rows_of(kd))
    for row, made in zip(rows_of(kd), changed.train.rows, strict=True):
        assert [label for label in made["labels"] if label != -100] == row["target"]
        whole = row["source"] if "bart" in family else (row["source"] + row["target"])[:-1]
        assert made["input_ids"] == whole


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_learns_what_the_teacher_says(
    family: str, request: Any, stock: Any, teacher: Any, run_stage: Any, answered: Any
) -> None:
    base = teacher(family)
    student = stock(request.getfixturevalue(family)(**SIZES), "student")
    data = answered(base)
    kd = run_stage(stage(), base, data=data, out="kd")
    config = {"type": "finetune", "train": TRAIN, "targets": "kd"}
    made = run_stage(config, student, data=data, models={"kd": kd}, out="made")

    def loss(found: Data) -> float:
        assert found.train is not None
        totals = [nll(Side(made.model(), made.family()), batch) for batch in found.train.loader(4)]
        return sum(one for one, _ in totals) / sum(count for _, count in totals)

    assert loss(with_targets(data, kd.path / TARGETS, "kd")) < 0.6 * loss(data)
    plain = run_stage({"type": "finetune", "train": TRAIN}, student, data=data, out="plain")
    assert plain.digest != made.digest


@pytest.mark.slow
def test_every_stage_that_trains_takes_targets_and_keeps_its_key_without(
    teacher: Any, run_stage: Any, answered: Any
) -> None:
    base = teacher("tiny_gpt2")
    data = answered(base)
    kd = run_stage(stage(), base, data=data, out="kd")
    train = {**TRAIN, "steps": 2}
    configs: list[dict[str, Any]] = [
        {"type": "finetune"},
        {"type": "distill", "teacher": "base"},
        {"type": "learn_masks", "teacher": "base"},
        {"type": "quantize", "teacher": "base", "weights": {"bits": 4}, "embedding": {"bits": 4}},
    ]
    for config in configs:
        written = STAGES.read(config | {"train": train}).model_dump(mode="json")
        assert not {"targets", "on_policy"} & set(written)
        models = {"base": base, "kd": kd}
        found = [
            run_stage(config | {"train": train} | more, base, data=data, models=models, out=f"{config['type']}{i}")
            for i, more in enumerate([{}, {"targets": "kd"}])
        ]
        losses = [json.loads((one.path / "history.jsonl").read_text().splitlines()[0])["loss"] for one in found]
        if config["type"] == "finetune":  # others are at distance 0 from themselves at first
            assert losses[0] != losses[1]
        assert found[1].manifest.lineage[-1].config["targets"] == "kd"


@pytest.mark.slow
def test_empty_answers_stay_and_are_reported(
    teacher: Any, run_stage: Any, answered: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = teacher("tiny_bart")
    data = answered(base)
    monkeypatch.setattr(
        TorchSubject, "complete", lambda self, prompts, *rest: [[2] if len(p) > 2 else [0, 5, 2] for p in prompts]
    )
    kd = run_stage(stage(), base, data=data)
    short = sum(len(row["source"]) == 2 for row in rows_of(kd))
    step = kd.manifest.lineage[-1]
    assert step.metrics["empty"] == 14 - short and len(rows_of(kd)) == 14
    assert step.coverage is not None and f"{14 - short} empty" in step.coverage["note"]
    drawn = run_stage(stage(do_sample=True, top_k=3), base, data=data, out="drawn").manifest.lineage[-1].coverage
    assert drawn is not None
    assert "; max_new_tokens 6, do_sample True, temperature 1.0, top_k 3, top_p 1.0; " in drawn["note"]
    monkeypatch.setattr(TorchSubject, "complete", lambda self, prompts, *rest: [[0, 2]] * len(prompts))
    with pytest.raises(NothingDoneError, match="kd: all 14 responses are empty"):
        run_stage(stage(), base, data=data, out="none")


@pytest.mark.slow
def test_a_target_that_does_not_fit_the_student_is_refused(
    teacher: Any, stock: Any, tiny_gpt2: Any, run_stage: Any, answered: Any
) -> None:
    base = teacher("tiny_gpt2")
    kd = run_stage(stage(), base, data=answered(base), out="kd")
    small = stock(tiny_gpt2(**{**SIZES, "vocab": 6}), "small")
    with pytest.raises(DataError, match="targets kd: row 0: token .* is not in the model's vocabulary of 6"):
        with_targets(answered(small), kd.path / TARGETS, "kd")
