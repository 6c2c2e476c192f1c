"""Pairs from every place rows may come from, through check, training and measuring of a tiny BART."""

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import BartConfig

import compress
from compress.cli.tables import cut_rows
from compress.errors import DataError, RecipeError
from compress.models.families.bart import BART
from compress.models.loading import build
from compress.models.scratch import train_bpe
from compress.pipeline import Inputs, make_plan
from compress.recipe import read_recipe

TRAIN = [("the cat sat", "le chat"), ("a dog ran far", "un chien"), ("the cats ate", "les chats")]
TEST = [("the dog sat", "le chien", "un chien"), ("a cat, far", "un chat", "")]
COLUMNS = {"source": "en", "target": "fr"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with its tokenizer, and the same rows in files of every kind."""
    folder = tmp_path_factory.mktemp("pairs")
    tokenizer = train_bpe([text for pair in TRAIN for text in pair] * 3, 270, BART)
    sizes = {f"{part}_{name}": 1 for part in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    config = BartConfig(
        d_model=8, encoder_ffn_dim=8, decoder_ffn_dim=8, max_position_embeddings=32, vocab_size=270, dropout=0.0,
        bos_token_id=0, pad_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=2, **sizes,
    )  # fmt: skip
    torch.manual_seed(0)
    build(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for name, rows in (("train", TRAIN), ("test", TEST)):
        table = [dict(zip(("en", "fr", "more"), row, strict=False)) for row in rows]
        ready = [{key: tokenizer(row[column])["input_ids"] for key, column in READY.items()} for row in table]
        datasets.Dataset.from_list(table).to_parquet(str(folder / f"{name}.parquet"))
        lines = "".join(json.dumps(row) + "\n" for row in table)
        (folder / f"{name}.jsonl").write_text(lines)
        (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
        (folder / f"{name}-ready.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ready))
        header = ["\t".join(table[0])]
        tabs = "\n".join(header + ["\t".join(row) for row in rows])
        (folder / f"{name}.tsv").write_text(tabs + "\n")
        (folder / "hub").mkdir(exist_ok=True)
        whole = "".join(json.dumps({"more": "", **row}) + "\n" for row in table)  # splits of a hub share their columns
        (folder / "hub" / f"{name}.jsonl").write_text(whole)
        for at, language in enumerate(table[0]):
            text = "".join(row[at] + "\n" for row in rows)
            (folder / f"{name}.{language}.gz").write_bytes(gzip.compress(text.encode()))
    return folder


READY = {"input_ids": "en", "labels": "fr"}


def place(kind: str, name: str, folder: Path) -> dict[str, Any]:
    targets = ["fr", "more"] if name == "test" else ["fr"]
    if kind == "text":
        return {"text": {"source": f"{name}.en.gz", "target": [f"{name}.{one}.gz" for one in targets]}}
    if kind == "ready":
        return {"json": f"{name}-ready.jsonl", "input_ids": "input_ids", "labels": "labels"}
    where = {"hub": str(folder / "hub"), "split": name} if kind == "hub" else {kind.split(".")[0]: f"{name}.{kind}"}
    if kind in ("jsonl", "jsonl.gz", "tsv"):
        where = {"csv" if kind == "tsv" else "json": f"{name}.{kind}"}
    return where | {"source": "en", "target": targets}


def recipe(folder: Path, kind: str, **data: Any) -> Path:
    metrics = ["perplexity"] if kind == "ready" else ["perplexity", "rouge", "bleu", "length"]
    written = {
        "version": 1,
        "name": "pairs",
        "model": {"path": "model"},
        "data": {name: place(kind, name, folder) for name in ("train", "test")} | data,
        "stages": [{"type": "finetune", "name": "tuned", "train": {"steps": 2, "batch": 2, "lr": 0.01}}],
        "measure": [{"type": "quality", "metric": metrics, "decoding": {"max_new_tokens": 5}}],
    }
    path = folder / f"{kind}.yaml"
    path.write_text(json.dumps(written))
    return path


def measured(folder: Path, kind: str) -> dict[str, Any]:
    done = compress.run(read_recipe(recipe(folder, kind)), folder / f"run-{kind}")
    return {record["name"]: record["quality"] for record in done.records}


@pytest.fixture(scope="module")
def truth(folder: Path) -> dict[str, Any]:
    return measured(folder, "jsonl")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jsonl.gz", "text", "tsv", "parquet", "hub", "ready"])
def test_every_place_gives_the_same_model_and_numbers(
    folder: Path, truth: dict[str, Any], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
    found = measured(folder, kind)
    assert truth["tuned"]["perplexity"] != truth["base"]["perplexity"]
    for name, quality in found.items():
        assert quality["perplexity"] == truth[name]["perplexity"]
        if kind != "ready":
            assert quality == truth[name]


def test_references_of_a_row_may_be_fewer(truth: dict[str, Any]) -> None:
    kept = [sample["references"] for sample in truth["tuned"]["samples"]]
    assert kept == [["le chien", "un chien"], ["un chat"]]


@pytest.mark.slow
def test_sources_and_targets_may_have_alphabets_of_their_own(folder: Path) -> None:
    """One id is two symbols: what an encoder reads as 5 has nothing to do with the 5 that a decoder writes."""
    rows = [{"x": [5, 6, 7], "y": [7, 6, 5, 2]}, {"x": [9], "y": [5, 2]}]
    (folder / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = {"json": "own.jsonl", "input_ids": "x", "labels": "y"}
    path = recipe(folder, "ready", train=own, test=own)
    done = compress.run(read_recipe(path), folder / "run-own")
    assert all(record["quality"]["perplexity"] > 1 for record in done.records)


@pytest.mark.slow
def test_a_batch_of_targets_that_are_padding_stops_a_run(folder: Path) -> None:
    rows = [{"x": [5, 6], "y": [-100, -100]}] * 3 + [{"x": [5, 6], "y": [5, 2]}]
    (folder / "pads.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pads = {"json": "pads.jsonl", "input_ids": "x", "labels": "y"}
    path = recipe(folder, "ready", train=pads, test=pads)
    settings = ["stages.tuned.train.batch=1", "stages.tuned.train.steps=4"]
    with pytest.raises(DataError, match=r"data\.train: no token of a batch is scored"):
        compress.run(read_recipe(path, settings), folder / "run-pads")


@pytest.mark.slow
def test_check_names_the_row_that_is_too_long_and_the_cure(folder: Path) -> None:
    rows = [{"en": "the cat", "fr": "le chat"}, {"en": "the dog " * 40, "fr": "un chien"}]
    (folder / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    long = {"json": "long.jsonl", **COLUMNS}
    path = recipe(folder, "jsonl", train=long)
    with pytest.raises(
        RecipeError, match=r"data\.train: row 1: .* has \d+ tokens; the model accepts at most 32 \(.*max_source"
    ):
        make_plan(Inputs(read_recipe(path), folder / "none"))
    plan = make_plan(Inputs(read_recipe(recipe(folder, "jsonl", train=long, max_source=32)), folder / "none"))
    assert list(cut_rows(plan)) == ["data.train: 1 of 2 rows were cut to fit"]


def test_check_counts_rows_without_a_word(folder: Path) -> None:
    rows = [{"en": "the cat", "fr": "le chat"}, {"en": "", "fr": "un chien"}]
    (folder / "blank.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = recipe(folder, "jsonl", train={"json": "blank.jsonl", **COLUMNS})
    plan = make_plan(Inputs(read_recipe(path), folder / "none"))
    assert list(cut_rows(plan)) == ["data.train: 1 of 2 rows have an empty input or target"]
