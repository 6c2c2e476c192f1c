"""A BART from nothing goes through every stage, measurement and command of one recipe."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import compress
from compress.artifact import adopt
from compress.cli.app import _exit_code
from compress.recipe import read_recipe
from compress.report import build

WORDS = {"cat": "Katze", "dog": "Hund", "house": "Haus", "tree": "Baum", "and": "und", "sees": "sieht", "old": "alt"}
TRAIN = {"steps": 4, "batch": 8, "lr": 3e-3, "precision": "fp32", "eval_every": 2}
BART = {
    "model_type": "bart", "d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 34, "decoder_ffn_dim": 26, "max_position_embeddings": 40,
    "scale_embedding": True,
}  # fmt: skip
STAGES: list[dict[str, Any]] = [
    {"type": "finetune", "name": "tuned", "train": {**TRAIN, "steps": 80, "lr": 1e-2, "eval_every": 20}},
    {"type": "learn_masks", "name": "masks", "teacher": "tuned", "train": TRAIN},
    {"type": "prune", "name": "cut", "keep": "1/2"},
    {"type": "distill", "name": "student", "teacher": "tuned", "train": TRAIN,
     "terms": ["adaptive_kl", {"type": "causal_kv", "weight": 0.1}, {"type": "hidden_mse", "weight": 0.1}]},
    {"type": "quantize", "name": "small", "teacher": "tuned", "weights": {"bits": 2}, "embedding": {"bits": 4},
     "train": TRAIN},
    {"type": "export_onnx", "name": "tuned-onnx", "source": "tuned"},
    {"type": "export_onnx", "name": "small-onnx", "source": "small"},
]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the recipe in the working directory ``work``, reported."""
    folder = tmp_path_factory.mktemp("bart")
    chance = random.Random(0)
    for name, count in (("train", 48), ("eval", 8), ("test", 6)):
        rows = [chance.choices(list(WORDS), k=chance.randint(2, 7)) for _ in range(count)]
        pairs = [{"source": " ".join(row), "target": " ".join(WORDS[word] for word in row)} for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    sides = {"source": "source", "target": "target"}
    recipe = {
        "version": 1,
        "name": "bart",
        "models": {"tiny": {"config": BART, "tokenizer": {"train_bpe": 290}}},
        "data": {name: {"json": f"{name}.jsonl", **sides} for name in ("train", "eval", "test")},
        "stages": [{"source": "tiny", **STAGES[0]}, *STAGES[1:]],
        "measure": [
            {"type": "size"},
            {"type": "quality", "of": ["tuned", "cut", "student", "small", "tuned-onnx", "small-onnx"],
             "metric": ["perplexity", "bleu", "rouge"], "decoding": {"max_new_tokens": 12, "num_beams": 2}},
            {"type": "speed", "of": ["tuned", "tuned-onnx", "small-onnx"], "prompt_tokens": 6, "new_tokens": 4,
             "threads": 1},
        ],
    }  # fmt: skip
    (folder / "bart.yaml").write_text(yaml.safe_dump(recipe))
    compress.run(read_recipe(folder / "bart.yaml"), folder / "work", device="cpu")
    build([folder / "work"], folder / "work")
    return folder


def records(finished: Path) -> dict[str, dict[str, Any]]:
    report = json.loads((finished / "work" / "report.json").read_text())
    return {record["name"]: record for record in report["artifacts"]}


def artifact(finished: Path, name: str) -> Path:
    (found,) = [path for path in (finished / "work").glob(f"*-{name}-*") if path.name.split("-", 1)[1][:-13] == name]
    return found


@pytest.fixture
def generated(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """``compress-lm generate`` with a model of the run: exit code, and what it said."""

    def generate(name: str, *options: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["compress-lm", "generate", str(artifact(finished, name)), *map(str, options)])
        capsys.readouterr()
        code = _exit_code()
        printed = capsys.readouterr()
        return code, printed.out or printed.err

    return generate


def test_every_number_is_in_the_report(finished: Path) -> None:
    found = records(finished)
    assert list(found) == ["tiny", "tuned", "masks", "cut", "student", "small", "tuned-onnx", "small-onnx"]
    for name in ("tuned", "cut", "student", "small", "tuned-onnx", "small-onnx"):
        assert {"perplexity", "bleu", "rouge1", "rouge2", "rougeL"} <= set(found[name]["quality"]), name
    for name in ("tuned", "tuned-onnx", "small-onnx"):
        assert found[name]["speed"]["per_token_ms"]["p50"] > 0
    assert found["tuned-onnx"]["quality"]["perplexity"] == pytest.approx(found["tuned"]["quality"]["perplexity"], 1e-4)
    assert found["small-onnx"]["quality"]["perplexity"] == pytest.approx(found["small"]["quality"]["perplexity"], 1e-2)
    assert found["tuned-onnx"]["quality"]["samples"] == found["tuned"]["quality"]["samples"]
    assert found["small-onnx"]["bytes"] < found["tuned-onnx"]["bytes"]


def test_what_was_made_is_what_was_asked_for(finished: Path) -> None:
    config = adopt(artifact(finished, "student")).config()
    assert (config.d_model, config.encoder_attention_heads, config.decoder_attention_heads) == (16, 2, 1)
    assert (config.encoder_ffn_dim, config.decoder_ffn_dim, config.decoder_layers) == (17, 13, 2)
    lines = [json.loads(line) for line in (artifact(finished, "tuned") / "history.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tuned", "tuned-onnx"])
def test_text_is_generated(generated: Callable[..., tuple[int, str]], name: str) -> None:
    options = ("--prompt", "cat and dog", "--max-new-tokens", 8)
    for num_beams in (1, 4):
        found = generated(name, *options, "--num-beams", num_beams)
        assert found[0] == 0 and found == generated("tuned", *options, "--num-beams", num_beams)
        assert "</s>" not in found[1] and found[1].strip()
    assert generated(name, "--prompt", "cat", "--max-new-tokens", 40)[0] == 0


@pytest.mark.parametrize("name", ["tuned", "tuned-onnx"])
def test_sources_and_answers_beyond_the_positions_are_reported(
    generated: Callable[..., tuple[int, str]], name: str
) -> None:
    code, said = generated(name, "--prompt", "0123456789 " * 5, "--max-new-tokens", 4)
    assert (code, said) == (2, "error: --prompt has 57 tokens, but the model accepts at most 40\n")
    code, said = generated(name, "--prompt", "cat", "--max-new-tokens", 41)
    assert (code, said) == (2, "error: --max-new-tokens is 41, but the model's responses have at most 40 tokens\n")
