"""A recipe names a script of ``evaluate``: found beside the recipe, reused while it is the same, shown as declared."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import compress
from compress.errors import UserError
from compress.measure.table import records_table
from compress.pipeline import Inputs, make_plan
from compress.recipe import read_recipe
from compress.report import build

SCRIPT = Path(__file__).parent / "measure/scripts/vowels.py"
RECIPE = """
version: 1
name: script
model: {config: {model_type: gpt2, n_layer: 1, n_embd: 16, n_head: 2, n_positions: 32}, tokenizer: {train_bpe: 262}}
data: {train: {text: lines.txt}, test: {json: pairs.jsonl, prompt: q, response: a}, block: 8}
measure:
  - type: quality
    metric: [length, {path: scripts/vowels.py, figures: {vowels: {label: vowels %, better: lower}}}]
    decoding: {max_new_tokens: 8, do_sample: true, seeds: [1]}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "scripts").mkdir()
    shutil.copy(SCRIPT, tmp_path / "scripts")
    (tmp_path / "lines.txt").write_text("the cat sat on the mat\nthe dog ran to the park\n" * 8)
    (tmp_path / "pairs.jsonl").write_text('{"q": "the cat", "a": "sat"}\n{"q": "the dog", "a": "ran"}\n')
    path = tmp_path / "script.yaml"
    path.write_text(RECIPE)
    return path


@pytest.mark.slow
def test_a_script_beside_the_recipe_is_measured_reported_and_reused(recipe: Path) -> None:
    work = recipe.parent / "work"
    (record,) = compress.run(recipe, work, device="cpu").records
    assert record["figures"] == {"vowels": {"label": "vowels %", "better": "lower"}}
    assert {"vowels", "most_references", "words_mean"} < set(record["quality"])
    build([work], work)
    header = next(line for line in (work / "report.md").read_text().splitlines() if line.startswith("| artifact"))
    assert "| vowels % | most references | mean words |" in header.replace(" change (of vowels %) |", "")
    (report,) = json.loads((work / "report.json").read_text())["artifacts"]
    assert report["figures"] == record["figures"]
    titles = [str(column.header).split("\n")[0] for column in records_table([record]).columns]
    assert titles[:4] == ["name", "vowels %", "most references", "mean words"]

    measured = set((work / "measured").iterdir())
    compress.run(recipe, work, device="cpu")
    assert set((work / "measured").iterdir()) == measured
    script = recipe.parent / "scripts/vowels.py"
    script.write_text(script.read_text().replace('"aeiou"', '""'))
    (changed,) = compress.run(recipe, work, device="cpu").records
    assert (changed["quality"]["vowels"], changed["quality"]["words_mean"]) == (0, record["quality"]["words_mean"])
    assert len(set((work / "measured").iterdir())) == 2


@pytest.mark.slow
def test_a_missing_script_is_found_before_any_work(recipe: Path) -> None:
    (recipe.parent / "scripts/vowels.py").unlink()
    with pytest.raises(UserError, match=r"script.yaml:8: measure\[0\].metric: there is no file .*scripts/vowels.py"):
        make_plan(Inputs(read_recipe(recipe), recipe.parent / "work"))


@pytest.mark.slow
def test_the_api_takes_the_same_names(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = recipe.parent / "work"
    (record,) = compress.run(recipe, work, device="cpu").records
    (model,) = work.glob("00-base-*")
    decoding = {"max_new_tokens": 8, "do_sample": True, "seeds": [1]}
    settings: dict[str, Any] = {"decoding": decoding, "progress": False}
    pairs = [("the cat", "sat"), ("the dog", "ran")]
    monkeypatch.chdir(recipe.parent)
    found = compress.evaluate(model, pairs, metrics=["length", {"path": "scripts/vowels.py"}], **settings)
    for key in ("vowels", "words_mean"):
        assert found[key] == record["quality"][key]
    refused: list[tuple[Any, str]] = [
        ([{"path": "vowels.py"}], "metrics: there is no file vowels.py"),
        ([{"pth": "vowels.py"}], "metrics: unknown key 'pth'"),
        (["rogue"], "metrics: unknown metric 'rogue'. Did you mean 'rouge'"),
    ]
    for metrics, message in refused:
        with pytest.raises(UserError, match=message):
            compress.evaluate(model, pairs, metrics=metrics, **settings)
