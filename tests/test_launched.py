"""A recipe under ``accelerate launch``: what one process makes of it, once, and no hanging process when it fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import compress
from compress.errors import RecipeError, UserError
from compress.pipeline import Inputs, make_plan
from compress.pipeline.running import choose_device
from compress.pipeline.workdir import locked
from compress.recipe import read_recipe
from tests.launching import ROOT, TIMEOUT, launch

RECIPE = """
version: 1
name: tiny
model: {config: {model_type: gpt2, n_layer: 1, n_embd: 16, n_head: 2, n_positions: 32}, tokenizer: {train_bpe: 262}}
data: {train: {text: lines.txt}, eval: {text: lines.txt}, block: 8}
stages:
  - {type: finetune, name: tuned, train: &train {steps: 4, batch: 5, precision: fp32, dropout: 0}}
  - {type: learn_masks, name: masks, method: magnitude}
  - {type: prune, name: cut, keep: 1/2}
  - {type: quantize, name: small, teacher: tuned, weights: {bits: 4}, embedding: {bits: 4}, train: *train}
measure: [size, quality]
"""
LAUNCHER = (
    "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1",
    "--mixed_precision=bf16", "--dynamo_backend=no", "--main_process_port=0", "-m",
)  # fmt: skip


def write_recipe(directory: Path) -> Path:
    (directory / "lines.txt").write_text("the cat sat on the mat\nthe dog ran to the park\n" * 8)
    path = directory / "tiny.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The directory of a recipe that two processes ran in ``two``, and what they printed."""
    recipe = write_recipe(tmp_path_factory.mktemp("launched"))
    command = ["compress", "run", str(recipe), "--workdir", str(recipe.parent / "two"), "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, *LAUNCHER, *command],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=TIMEOUT,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return recipe, done.stdout


def losses(workdir: Path, name: str) -> list[float]:
    history = next(workdir.glob(f"*-{name}-*")) / "history.jsonl"
    lines: list[dict[str, Any]] = [json.loads(line) for line in history.read_text().splitlines()]
    return [line.get("loss", line.get("eval_nll")) for line in lines]


@pytest.mark.slow
def test_the_main_process_alone_makes_and_tells(launched: tuple[Path, str]) -> None:
    recipe, printed = launched
    for text in ("✓ tuned", "✓ small", "quality is measured", "report:"):
        assert printed.count(text) == 1, printed
    work = recipe.parent / "two"
    names = sorted(path.name.rsplit("-", 1)[0] for path in work.iterdir() if path.is_dir())
    assert names == ["00-base", "01-tuned", "02-masks", "03-cut", "04-small", "measured"]
    assert {path.name for path in work.iterdir() if path.is_file()} >= {"report.html", "run.json", "recipe.yaml"}


@pytest.mark.slow
def test_one_process_makes_the_same_and_reuses_what_two_made(launched: tuple[Path, str]) -> None:
    recipe, _ = launched
    compress.run(recipe, recipe.parent / "one", device="cpu")
    for name in ("tuned", "small"):
        assert losses(recipe.parent / "two", name) == pytest.approx(losses(recipe.parent / "one", name), rel=1e-4)
    compress.run(recipe, recipe.parent / "two", device="cpu")
    stages = json.loads((recipe.parent / "two" / "run.json").read_text())["stages"]
    assert [stage["reused"] for stage in stages] == [True] * 4


@pytest.mark.slow
def test_an_error_of_the_main_process_ends_all_and_is_reported_once(tmp_path: Path) -> None:
    recipe, work = write_recipe(tmp_path), tmp_path / "work"
    with locked(work):
        main, other = launch(2, "-m", "compress", "run", recipe, "--workdir", work, "--device", "cpu")
    assert main.returncode == 2 and other.returncode == 0
    assert main.stderr == f"error: --workdir {work}: another run is using it\n"
    assert (main.stdout, other.stdout, other.stderr) == ("", "", "")


@pytest.mark.slow
def test_an_error_of_all_is_reported_once(tmp_path: Path) -> None:
    recipe, work = write_recipe(tmp_path), tmp_path / "work"
    setting = "stages.tuned.train.lr=1e30"
    done = launch(2, "-m", "compress", "run", recipe, "--workdir", work, "--device", "cpu", "--set", setting)
    assert [each.returncode for each in done] == [1, 0]
    assert "error: tuned: loss on data.eval is nan at step 1" in done[0].stderr
    assert done[0].stderr.count("error: ") == 1 and "error: " not in done[1].stderr
    assert not list(work.glob(".process-*"))


@pytest.mark.slow
def test_a_batch_that_not_every_process_gets_a_part_of_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "5")
    make_plan(Inputs(read_recipe(recipe), tmp_path / "work"))
    monkeypatch.setenv("WORLD_SIZE", "6")
    message = r"stages\[0\]\.train\.batch: 5 sequences cannot be shared by 6 processes; start at most 5"
    with pytest.raises(RecipeError, match=message):
        make_plan(Inputs(read_recipe(recipe), tmp_path / "work"))


@pytest.mark.slow
def test_one_process_where_several_were_asked_for_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, console = write_recipe(tmp_path), Console(record=True, width=140)
    recipe.write_text(RECIPE.split("stages:")[0])
    compress.run(recipe, tmp_path / "plain", device="cpu", console=console)
    assert "one process" not in console.export_text()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    compress.run(recipe, tmp_path / "work", console=console)
    assert "running as one process: accelerate launch --cpu starts several only with mpirun" in console.export_text()


def test_a_launcher_set_to_cpu_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert choose_device(None) == "cuda"
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    assert choose_device(None) == "cpu" and choose_device("cuda") == "cuda"


def test_fsdp_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = write_recipe(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="accelerate launch: FSDP splits a model"):
        compress.run(recipe, tmp_path / "work", device="cpu")
    assert not (tmp_path / "work").exists()
