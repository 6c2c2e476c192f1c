"""Another distribution adds a part of every kind: installed, listed, used."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

ROOT = Path(__file__).parents[1]
PLUGIN = Path(__file__).parent / "plugin"

pytestmark = pytest.mark.slow

RECIPE = """
version: 1
name: plugin
model: {path: model}
data:
  train: {json: rows.jsonl, input_ids: ids}
  test: {json: rows.jsonl, input_ids: ids}
stages:
  - {type: round_to_half, name: half}
  - {type: distill, name: taught, teacher: base, terms: [logit_mse], train: {steps: 3, batch: 4, lr: 1.0e-3}}
  - {type: quantize, name: small, weights: {bits: 4, method: power_of_two}, embedding: {bits: 4}, train: {steps: 0}}
  - {type: export_onnx, name: small-onnx}
measure:
  - {type: sparsity, of: [base, small]}
  - {type: quality, of: [base, small, small-onnx], metric: [perplexity]}
"""

MODEL = "{config: {model_type: gpt2, n_layer: 1, n_embd: 16, n_head: 2, n_positions: 32}, tokenizer: {train_bpe: 270}}"
TEXTS = f"""
version: 1
name: texts
models: {{base: {MODEL}, other: {MODEL.replace("n_embd: 16", "n_embd: 8")}}}
data:
  train: {{text: lines.txt}}
  test: {{json: pairs.jsonl, prompt: q, response: a}}
  block: 16
measure:
  - size
  - {{type: quality, metric: [length, repetition], decoding: {{max_new_tokens: 8}}}}
"""

API = """
import json
from transformers import MistralForCausalLM
import compress

model = MistralForCausalLM.from_pretrained("model").eval()
rows = [{"input_ids": json.loads(line)["ids"]} for line in open("rows.jsonl")]
small = compress.prune(model, compress.score(model, axes=["groups", "ffn"]), keep="1/2")
done = compress.distill(small, teacher=model, data=rows, terms=["logit_mse"], steps=3, batch=4, progress=False)
compress.quantize_(small, weights=4, method="power_of_two", activations=None)
codes, scale = small.model.layers[0].mlp.up_proj.quantizer.codes()
print(json.dumps({
    "shape": [small.config.intermediate_size, small.config.num_key_value_heads, small.config.num_attention_heads],
    "terms": list(done.history[0]["terms"]),
    "scale": scale.item(),
}))
"""


EVALUATE = """
import json, sys
import compress

pairs = [("the cat", "sat"), ("the dog", "ran")]
settings = {"decoding": {"max_new_tokens": 8}, "progress": False}
print(json.dumps(compress.evaluate(sys.argv[1], pairs, metrics=["repetition"], **settings)["repetition"]))
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the installed plug-in, a tiny model of its family and rows of tokens."""
    home = tmp_path_factory.mktemp("plugin")
    shutil.copytree(PLUGIN, home / "source")  # building leaves files beside the source
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(home / "site"), str(home / "source")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=67, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, sliding_window=None,
    )  # fmt: skip
    MistralForCausalLM(config).save_pretrained(home / "model")
    rows = [{"ids": [3 + (5 * i + j) % 60 for j in range(10)]} for i in range(16)]
    (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (home / "recipe.yaml").write_text(RECIPE)
    (home / "lines.txt").write_text("the cat sat on the mat\nthe dog ran to the park\n" * 8)
    (home / "pairs.jsonl").write_text('{"q": "the cat", "a": "sat"}\n{"q": "the dog", "a": "ran"}\n')
    (home / "texts.yaml").write_text(TEXTS)
    return home


def run(home: Path, *arguments: str, installed: bool = True) -> subprocess.CompletedProcess[str]:
    paths = [str(home / "site")] * installed + [str(ROOT)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "COLUMNS": "200"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, check=False)


def records(home: Path) -> dict[str, Any]:
    report = json.loads((home / "run/report.json").read_text())
    return {record["name"]: record for record in report["artifacts"]}


def test_a_recipe_uses_them(home: Path) -> None:
    done = run(home, "-m", "compress", "run", "recipe.yaml", "--workdir", "run")
    assert done.returncode == 0, done.stdout + done.stderr
    found = records(home)
    assert found["small"]["sparsity"] > found["base"]["sparsity"]
    torch_quality, onnx_quality = (found[name]["quality"]["perplexity"] for name in ("small", "small-onnx"))
    assert onnx_quality == pytest.approx(torch_quality, rel=1e-2)


def test_the_command_lists_and_describes_them(home: Path) -> None:
    listed = run(home, "-m", "compress", "list").stdout
    assert all(name in listed for name in ("round_to_half", "logit_mse", "sparsity", "repetition"))
    assert "Round every weight" in run(home, "-m", "compress", "describe", "round_to_half").stdout
    assert "repeated words %" in run(home, "-m", "compress", "describe", "repetition").stdout


def test_a_metric_has_its_label_its_place_and_its_direction_everywhere(home: Path) -> None:
    """In the terminal and the report alike, and in a report that is written where the plug-in is missing."""
    done = run(home, "-m", "compress", "run", "texts.yaml", "--workdir", "texts")
    assert done.returncode == 0, done.stdout + done.stderr
    titles = next(line for line in done.stdout.splitlines() if line.startswith("name"))
    assert titles.index("repeated words %") < titles.index("mean words"), "its order is before those of lengths"
    table = "| repeated words % | mean words |"
    figure = "repeated words % (less is better)"
    assert table in (home / "texts/report.md").read_text()
    assert figure in (home / "texts/report.html").read_text()
    (model,) = (home / "texts").glob("00-base-*")
    base = next(each for each in json.loads((home / "texts/report.json").read_text())["artifacts"])
    told = run(home, "-c", EVALUATE, str(model))
    assert told.returncode == 0, told.stderr
    assert json.loads(told.stdout) == base["quality"]["repetition"]
    away = run(home, "-m", "compress", "report", "texts", "--out", "away", installed=False)
    assert away.returncode == 0, away.stderr
    assert table in (home / "away/report.md").read_text()
    assert figure in (home / "away/report.html").read_text()


def test_the_api_uses_them(home: Path) -> None:
    done = run(home, "-c", API)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["shape"] == [24, 1, 2]
    assert found["terms"] == ["logit_mse"]
    assert math.log2(found["scale"]).is_integer()


def test_without_the_plug_in_the_names_are_unknown(home: Path) -> None:
    done = run(home, "-m", "compress", "check", "recipe.yaml", installed=False)
    assert done.returncode == 2
    assert "round_to_half" in done.stdout + done.stderr
