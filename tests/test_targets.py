"""Generated targets in a run: made once, reused, continued, reported, and kept out of what needs a model."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import compress
from compress.errors import ModelError, RecipeError
from compress.generation.subject import TorchSubject
from compress.pipeline import Inputs, Run, make_plan
from compress.recipe import read_recipe
from compress.report import build

SIZES = {
    "gpt2": "{model_type: gpt2, n_layer: 1, n_embd: 8, n_head: 2, n_positions: 48}",
    "bart": (
        "{model_type: bart, d_model: 8, encoder_layers: 1, decoder_layers: 1, encoder_attention_heads: 2, "
        "decoder_attention_heads: 2, encoder_ffn_dim: 16, decoder_ffn_dim: 16, max_position_embeddings: 48}"
    ),
}
COLUMNS = {"gpt2": "prompt: question, response: answer", "bart": "source: question, target: answer"}
RECIPE = """
version: 1
name: tiny
model: {{config: {config}, tokenizer: {{train_bpe: 270}}}}
data: {{train: {{json: rows.jsonl, {columns}}}, eval: {{json: rows.jsonl, {columns}, limit: 4}}}}
stages:
  - {{type: seq_kd, name: kd, decoding: {{num_beams: 2, max_new_tokens: 6}}, batch: 4}}
  - {{type: distill, name: taught, teacher: base, targets: kd, train: {{steps: 2, batch: 4}}}}
  - {{type: finetune, name: plain, source: base, train: {{steps: 2, batch: 4}}}}
measure: [size]
"""


@pytest.fixture
def recipe(request: Any, tmp_path: Path) -> Path:
    family = getattr(request, "param", "bart")
    rows = [{"question": f"the {a} and the {b}?", "answer": f"{b} {a}"} for a in ["cat", "dog", "ox"] for b in "pqr"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(config=SIZES[family], columns=COLUMNS[family]))
    return path


def run(path: Path, *settings: str, workdir: str = "work", console: Console | None = None) -> Run:
    return compress.run(read_recipe(path, settings), path.parent / workdir, console=console)


def states(path: Path, *settings: str) -> dict[str, str]:
    plan = make_plan(Inputs(read_recipe(path, settings), path.parent / "work"))
    return {row.name: row.state for row in plan.rows}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["gpt2", "bart"], indirect=True)
def test_targets_are_made_once_and_the_next_stage_starts_from_a_model(recipe: Path) -> None:
    rows = {row.name: row for row in make_plan(Inputs(read_recipe(recipe), recipe.parent / "work")).rows}
    assert (rows["kd"].traits, rows["kd"].parameters) == (("targets",), None)
    assert (rows["taught"].source, rows["taught"].note) == ("base", "targets kd")
    done = run(recipe)
    lines = [json.loads(line) for line in (done.artifacts["kd"].path / "targets.jsonl").read_text().splitlines()]
    assert len(lines) == 9 and all(isinstance(line["text"], str) for line in lines)
    assert done.artifacts["taught"].manifest.lineage[-1].inputs["targets"] == done.artifacts["kd"].digest
    assert set(states(recipe).values()) == {"reused"}


@pytest.mark.slow
def test_a_key_covers_the_targets_and_not_their_name(recipe: Path) -> None:
    run(recipe)
    changed = states(recipe, "stages.kd.decoding.num_beams=1")
    assert (changed["kd"], changed["taught"], changed["plain"]) == ("runs", "runs", "reused")
    renamed = states(recipe, "stages.kd.name=said", "stages.taught.targets=said")
    assert set(renamed.values()) == {"reused"}
    own = states(recipe, "stages.taught.targets=null")
    assert (own["kd"], own["taught"]) == ("reused", "runs")


@pytest.mark.slow
def test_other_targets_rerun_what_is_trained_on_them(recipe: Path) -> None:
    first = run(recipe)
    second = run(recipe, "stages.kd.decoding={do_sample: true, temperature: 2.0, max_new_tokens: 6}")
    same, other = (done.artifacts["plain"].digest for done in (first, second))
    assert same == other
    assert first.artifacts["kd"].digest != second.artifacts["kd"].digest
    assert first.artifacts["taught"].digest != second.artifacts["taught"].digest


@pytest.mark.slow
def test_an_interrupted_run_continues_at_the_batch_where_it_was(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    straight = run(recipe, workdir="straight")
    sizes, original = [], TorchSubject.complete

    def interrupted(self: TorchSubject, prompts: Any, *rest: Any) -> Any:
        sizes.append(len(prompts))
        if len(sizes) == 2:
            signal.raise_signal(signal.SIGINT)
        return original(self, prompts, *rest)

    monkeypatch.setattr(TorchSubject, "complete", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(recipe)
    assert states(recipe)["kd"] == "continued"
    resumed = run(recipe)
    assert sizes == [4, 4, 1]
    assert resumed.artifacts["kd"].digest == straight.artifacts["kd"].digest
    assert not (resumed.artifacts["kd"].path / "checkpoints").exists()


@pytest.mark.slow
def test_no_model_is_looked_for_in_targets(recipe: Path) -> None:
    done = run(recipe)
    assert [record["name"] for record in done.records] == ["base", "taught", "plain"]
    build([done.workdir], done.workdir)
    written = (done.workdir / "report.md").read_text()
    report = json.loads((done.workdir / "report.json").read_text())
    assert [artifact["name"] for artifact in report["artifacts"]] == ["base", "taught", "plain"]
    assert "base, teacher base, targets kd" in written and "rows in place of modules" in written
    assert "max_new_tokens 6, do_sample False, beams 2, length_penalty 1.0; " in written
    assert "- taught: taught (targets kd) (`" in written and "- plain: plain (`" in written


@pytest.mark.slow
def test_steps_on_own_answers_are_in_the_key_and_in_the_report(recipe: Path) -> None:
    run(recipe)
    settings = ("stages.taught.on_policy={fraction: 0.9, max_new_tokens: 5}",)
    assert states(recipe, *settings)["taught"] == "runs"
    done = run(recipe, *settings)
    build([done.workdir], done.workdir)
    assert "on policy steps 2" in (done.workdir / "report.md").read_text()


@pytest.mark.slow
def test_a_result_of_targets_is_no_model_of_another_run(recipe: Path) -> None:
    done = run(recipe)
    kd, plain = (done.artifacts[name].path for name in ("kd", "plain"))
    other = recipe.with_name("other.yaml")
    for models, name, stages in (
        (f"model: {kd}", "base", "[export_onnx]"),
        (f"model: {kd}", "base", "[]"),
        (f"models: {{plain: {plain}, said: {kd}}}", "said", "[]"),
    ):
        other.write_text(f"version: 1\nname: other\n{models}\nstages: {stages}\nmeasure: [size]\n")
        with pytest.raises(
            RecipeError, match=rf"other.yaml:3: models\.{name}: contains generated targets, not a model"
        ):
            make_plan(Inputs(read_recipe(other), recipe.parent / "elsewhere"))
    with pytest.raises(ModelError, match="contains generated targets, not a model"):
        compress.load(kd)
