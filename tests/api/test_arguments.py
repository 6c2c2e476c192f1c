"""A wrong argument gives one error that begins with its name, and changes nothing: no weight, no mode, no file."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch

import compress
from compress.errors import CompressError
from compress.models.families.gpt2 import GPT2
from compress.models.scratch import train_bpe
from tests.api.unchanged import assert_same, state

ROWS = [{"input_ids": [3 + (5 * i + j) % 60 for j in range(10)]} for i in range(8)]
TEXTS = ["the dog sees", "the cat"]
OMITTED = object()


@dataclass(frozen=True)
class Made:
    """An argument that is made of the model and an empty directory."""

    by: Callable[[Any, Path], Any]


LINE = {"step": 1, "loss": 1.0, "terms": {"a": 1.0}}
RECORD = {"name": "a", "bytes": 2**20, "quality": {"perplexity": 20.0}}
GOOD: dict[str, dict[str, Any]] = {
    "learn_masks": {"data": ROWS, "steps": 1, "progress": False},
    "score": {"data": ROWS, "method": "loss_aware", "steps": 1, "progress": False},
    "prune": {"masks": Made(lambda model, _: compress.score(model)), "keep": "2/4"},
    "drop_layers": {"keep": 1},
    "finetune": {"data": ROWS, "steps": 1, "progress": False},
    "distill": {"teacher": Made(lambda model, _: copy.deepcopy(model)), "data": ROWS, "steps": 1, "progress": False},
    "quantize_": {},
    "save": {"out": Made(lambda _, path: path / "out")},
    "export_onnx": {"out": Made(lambda _, path: path / "out")},
    "load": {"path": Made(lambda model, path: compress.save(model, path / "given"))},
    "evaluate": {"data": ROWS, "progress": False},
    "benchmark": {"models": Made(lambda model, _: [model]), "prompt_tokens": 4, "new_tokens": 2, "rounds": 1},
    "Masks": {"values": {"hidden": torch.ones(32)}, "scored": True},
    "Masks.load": {"path": Made(lambda _, path: path / "masks.safetensors")},
    "plots.training": {"trained": [LINE, LINE | {"step": 2}]},
    "plots.pareto": {"records": [RECORD, RECORD]},
    "plots.masks": {"masks": {"hidden": torch.ones(2)}},
    "read_recipe": {"path": Made(lambda _, path: path / "recipe.yaml")},
    "run": {"recipe": Made(lambda _, path: path / "recipe.yaml"), "workdir": Made(lambda _, path: path / "runs")},
}
"""Arguments that work."""
WITHOUT_MODEL = {"load", "benchmark", "Masks", "Masks.load", "read_recipe", "run"}
"""Functions, besides those of plots, that take no model as their first argument."""


def _no_masks(_: Any, path: Path) -> Path:
    (path / "given").write_text("text")
    return path / "given"


MISSING = Made(lambda _, path: path / "missing")
NO_MASKS = Made(_no_masks)
ANOTHER = Made(lambda model, _: copy.deepcopy(model))
READER = Made(lambda *_: train_bpe(TEXTS, 260, GPT2))
MAGNITUDE = {"method": "magnitude", "data": OMITTED, "steps": OMITTED}

BAD: list[tuple[str, Mapping[str, Any], str]] = [
    # seeds and flags
    ("finetune", {"seed": -1}, "seed: expected a whole number from 0, below 2**32, got -1"),
    ("learn_masks", {"seed": "1"}, "seed: expected a whole number from 0, below 2**32, got '1'"),
    ("score", {"seed": 1.0}, "seed: expected a whole number from 0, below 2**32, got 1.0"),
    ("distill", {"seed": 2**32}, "seed: expected a whole number from 0, below 2**32, got 4294967296"),
    ("export_onnx", {"seed": True}, "seed: expected a whole number from 0, below 2**32, got True"),
    ("finetune", {"progress": 1}, "progress: expected True or False, got 1"),
    ("evaluate", {"progress": "no"}, "progress: expected True or False, got 'no'"),
    ("prune", {"uniform": "no"}, "uniform: expected True or False, got 'no'"),
    ("prune", {"fold_masks": 1}, "fold_masks: expected True or False, got 1"),
    ("load", {"dequantize": 1}, "dequantize: expected True or False, got 1"),
    # data
    ("finetune", {"data": 3}, "data: int is not supported"),
    ("finetune", {"data": torch.ones(2, 3)}, "data: Tensor is not supported"),
    ("finetune", {"data": ROWS[0]}, "data: dict is not supported"),
    ("finetune", {"data": [None, "a"]}, "data: row 0 has type NoneType"),
    ("finetune", {"data": ["a", None]}, "data: row 1 has type NoneType, but row 0 has type text"),
    ("finetune", {"data": [("a", None)], "tokenizer": READER}, "data: row 0: expected a string, got NoneType"),
    ("finetune", {"data": [{"text": None}], "tokenizer": READER}, "data: row 0: expected a string, got NoneType"),
    ("finetune", {"data": [ROWS[0], {"x": 1}]}, "data: row 1 has no input_ids, but row 0 has"),
    ("finetune", {"data": [{"input_ids": [1.5, 2]}]}, "data: row 0: expected input_ids to be a list of whole numbers"),
    ("finetune", {"data": [{"input_ids": [[1, 2]]}]}, "data: row 0: expected input_ids to be a list of whole numbers"),
    ("finetune", {"data": [{"input_ids": None}]}, "data: row 0: expected input_ids to be a list of whole numbers"),
    ("finetune", {"data": [{"input_ids": [1, 2000]}]}, "data: row 0: token 2000 is not in the model's vocabulary"),
    (
        "finetune",
        {"data": [ROWS[0], {"input_ids": [1, 2, 3], "attention_mask": [1, 1]}]},
        "data: row 1 has 3 input_ids and 2 values in attention_mask",
    ),
    ("finetune", {"data": [{"input_ids": [1, 2, 3], "labels": [1, 2]}]}, "data: row 0 has 3 input_ids and 2 labels"),
    ("finetune", {"data": [{"input_ids": [1, 2], "attention_mask": [0, 0]}]}, "data: row 0 has no token"),
    ("finetune", {"eval_data": 3}, "eval_data: int is not supported"),
    ("finetune", {"eval_data": []}, "eval_data: has no rows"),
    ("evaluate", {"data": 3}, "data: int is not supported"),
    ("finetune", {"tokenizer": "gpt2"}, "tokenizer: expected a transformers tokenizer, got str"),
    ("save", {"tokenizer": 3}, "tokenizer: expected a transformers tokenizer, got int"),
    ("export_onnx", {"tokenizer": 3}, "tokenizer: expected a transformers tokenizer, got int"),
    ("finetune", {"block": "8"}, "block: expected a whole number from 2, or None, got '8'"),
    # terms, metrics, axes and other choices
    ("finetune", {"terms": 3}, "terms: expected a list of terms such as ['adaptive_kl'], got int"),
    ("finetune", {"terms": {"cross_entropy"}}, "terms: expected a list of terms such as ['adaptive_kl'], got set"),
    ("finetune", {"terms": []}, "terms: is empty"),
    (
        "finetune",
        {"terms": ["cross_entropy", 3]},
        "terms[1]: expected the name of a term such as 'adaptive_kl', got int",
    ),
    ("distill", {"terms": [{1: 1}]}, "terms[0]: has the key 1"),
    ("distill", {"terms": [{"weight": 1}]}, "terms[0]: unknown term None"),
    ("distill", {"terms": [{"type": "adaptive_kl", "weight": "x"}]}, "terms[0].weight: "),
    ("evaluate", {"metrics": 3}, "metrics: expected a list of some of perplexity"),
    ("evaluate", {"metrics": []}, "metrics: expected a list of some of perplexity"),
    ("evaluate", {"metrics": [None]}, "metrics: unknown metric None"),
    ("evaluate", {"metrics": [["perplexity"]]}, "metrics: unknown metric ['perplexity']"),
    ("evaluate", {"metrics": ["perplexity", "perplexity"]}, "metrics: 'perplexity' is named twice"),
    ("score", {"axes": 3}, "axes: expected a list of some of hidden, heads, ffn, got int"),
    ("score", {"axes": [3]}, "axes: 3 is unknown"),
    ("score", {"method": 3}, "method: 3 is not known; allowed: magnitude, loss_aware, movement"),
    ("export_onnx", {"head": "foo"}, "head: 'foo' is not known; allowed: tied, split"),
    ("export_onnx", {"graph": "foo"}, "graph: 'foo' is not known; allowed: decoding, plain"),
    ("quantize_", {"weights": "4"}, "weights: "),
    ("quantize_", {"embedding": 5}, "embedding: "),
    ("quantize_", {"granularity": "foo"}, "granularity: "),
    ("quantize_", {"group_size": 7}, "group_size: "),
    ("quantize_", {"method": "foo"}, "method: "),
    ("quantize_", {"init": "foo"}, "init: "),
    ("quantize_", {"activations": {"clip": -1}}, "activations.clip: "),
    ("evaluate", {"metrics": {"path": "missing.py"}}, "metrics: there is no file missing.py"),
    ("evaluate", {"metrics": [{"pth": "missing.py"}]}, "metrics: unknown key 'pth'"),
    (
        "evaluate",
        {"metrics": [{1: "missing.py"}]},
        "metrics: expected the fields of a script, such as path, got the key 1",
    ),
    ("export_onnx", {"out": "a\0b"}, "out: expected a path such as 'runs/small', got 'a\\x00b'"),
    (
        "finetune",
        {"data": [{"input_ids": [1, 2], "attention_mask": [1, 2]}]},
        "data: row 0: attention_mask is not a list",
    ),
    ("quantize_", {"embedding": 7}, "embedding: "),
    ("quantize_", {"activations": 4}, "activations.bits: "),
    ("quantize_", {"filter": lambda name: True}, "filter: expected a function of two arguments"),
    ("finetune", {"steps": "x"}, "steps: "),
    ("finetune", {"lr": "x"}, "lr: "),
    ("score", {"method": "movement", "weights_lr": -1.0}, "weights_lr: "),
    # what would change nothing
    ("finetune", {"mask_lr": 0.1}, "mask_lr: would change nothing, no mask trains; leave it out"),
    ("finetune", {"scale_lr": 0.1}, "scale_lr: would change nothing, the model has no scales that train"),
    ("finetune", {"projection_lr": 0.1}, "projection_lr: would change nothing, no term has parts that train"),
    ("finetune", {"eval_every": 1}, "eval_every: would change nothing, there is no data to evaluate on"),
    ("finetune", {"keep": "best"}, "keep: would change nothing, there is no data to evaluate on"),
    ("finetune", {"checkpoint_every": 1}, "checkpoint_every: would change nothing, a model in memory writes no"),
    ("finetune", {"block": 8}, "block: would change nothing, because it cuts only running text"),
    ("evaluate", {"block": 8}, "block: would change nothing, because it cuts only running text"),
    ("learn_masks", {"lr": 0.1}, "lr: would change nothing, the weights of the model do not train"),
    ("learn_masks", {"weight_decay": 0.1}, "weight_decay: would change nothing"),
    ("learn_masks", {"teacher": ANOTHER, "terms": ["cross_entropy"]}, "teacher: would change nothing, because none"),
    ("distill", {"terms": ["cross_entropy"]}, "teacher: would change nothing, because none of the terms (cross"),
    ("score", {"lr": 0.1}, "lr: would change nothing"),
    ("score", {"warmup": 0.1}, "warmup: would change nothing, nothing trains while gradients are summed"),
    ("score", {"teacher": ANOTHER}, "teacher: would change nothing, because none of the terms (cross"),
    ("score", {"weights_lr": 0.1}, "weights_lr: applies only to method movement; leave it out"),
    ("score", {"method": "movement"}, "weights_lr: is missing; method movement"),
    ("evaluate", {"metric": "perplexity"}, "metric: is called metrics here"),
    ("prune", {"keep": {}}, "keep: {} keeps every unit"),
    ("score", {"method": "movement", "weights_lr": 0.1, "lr": 0.1}, "lr: would change nothing, weights train at"),
    ("score", {"method": "magnitude"}, "data: would change nothing, method magnitude uses only the weights"),
    (
        "score",
        MAGNITUDE | {"teacher": ANOTHER},
        "teacher: would change nothing, method magnitude uses only the weights",
    ),
    ("score", MAGNITUDE | {"terms": ["cross_entropy"]}, "terms: would change nothing, method magnitude"),
    ("score", MAGNITUDE | {"steps": 1}, "steps: would change nothing, method magnitude"),
    ("score", MAGNITUDE | {"seed": 1}, "seed: would change nothing, method magnitude"),
    ("prune", {"fold_masks": True}, "fold_masks: these are scores"),
    ("quantize_", {"method": "twn", "weights": 2, "init": "one"}, "init: would change nothing, method twn has no"),
    ("quantize_", {"embedding": 8, "filter": lambda name, _: "mlp" in name}, "embedding: would change nothing"),
    ("load", {"dequantize": True}, "dequantize: would change nothing"),
    ("export_onnx", {"head": "split"}, "head: split needs packed codes"),
    ("evaluate", {"decoding": {"num_beams": 2}}, "decoding: would change nothing, perplexity generates no text"),
    ("evaluate", {"sentences": "stops"}, "sentences: stops applies only to the rouge metric"),
    ("evaluate", {"of": "a"}, "of: would change nothing"),
    ("evaluate", {"reference": ANOTHER}, "reference: belongs to a metric that compares with it, such as agreement"),
    ("evaluate", {"metrics": ["agreement"]}, "reference: belongs to a metric that compares with it, such as agreement"),
    # models
    ("finetune", {"model": None}, "model: expected a transformers model such as"),
    ("distill", {"teacher": None}, "teacher: "),
    ("distill", {"teacher": "gpt2"}, "teacher: expected a transformers model such as"),
    ("save", {"model": 3}, "model: expected a transformers model such as"),
    ("export_onnx", {"model": 3}, "model: expected the path of a model directory, got 3"),
    ("export_onnx", {"model": MISSING}, "model: "),
    ("evaluate", {"model": 3}, "model: expected a transformers model such as"),
    ("evaluate", {"model": MISSING}, "model: "),
    ("evaluate", {"metrics": ["agreement"], "reference": 3}, "reference: expected a transformers model such as"),
    ("evaluate", {"batch": "x"}, "batch: "),
    ("benchmark", {"models": 3}, "models: expected a list of models and directories, got int"),
    ("benchmark", {"models": [None]}, "models: model 0: expected a transformers model such as"),
    ("benchmark", {"models": {1: "a"}}, "models: expected names that are strings, such as 'small', got 1"),
    ("benchmark", {"models": {}}, "models: is empty"),
    ("benchmark", {"models": MISSING}, "models: missing: "),
    ("benchmark", {"rounds": 0}, "rounds: "),
    ("benchmark", {"threads": "x"}, "threads: "),
    ("drop_layers", {"keep": "1"}, "keep: expected a number of layers or a list such as [0, 2, 5], got '1'"),
    ("drop_layers", {"keep": 0}, "keep: cannot keep 0 of 2 layers; allowed: 1 to 2"),
    ("prune", {"masks": {"hidden": torch.ones(32)}}, "masks: expected Masks, from learn_masks or score, got dict"),
    ("prune", {"keep": ["2/4"]}, "keep: write an exact fraction"),
    ("prune", {"keep": OMITTED, "parameters": "x"}, "parameters: "),
    # paths, masks, devices
    ("save", {"out": 3}, "out: expected a path such as 'runs/small', got 3"),
    ("save", {"out": ""}, "out: expected a path such as 'runs/small', got ''"),
    ("export_onnx", {"out": 3}, "out: expected a path such as 'runs/small', got 3"),
    ("load", {"path": 3}, "path: expected the path of a model directory, got 3"),
    ("load", {"path": MISSING}, "path: "),
    ("load", {"device": "tpu9"}, "device: 'tpu9' cannot hold a model here; allowed: cpu"),
    ("load", {"device": "meta"}, "device: 'meta' cannot hold a model here"),
    ("load", {"device": 3}, "device: '3' cannot hold a model here"),
    ("Masks", {"values": [1]}, "values: expected a mapping of axis names to tensors, got list"),
    (
        "Masks",
        {"values": {"hidden": torch.ones(2, 2)}},
        "values['hidden']: expected a tensor with one value per unit, got tensor",
    ),
    ("Masks", {"scored": 1}, "scored: expected True or False, got 1"),
    ("Masks.load", {"path": 3}, "path: expected a path such as 'runs/small', got 3"),
    ("Masks.load", {"path": MISSING}, "path: "),
    ("Masks.load", {"path": NO_MASKS}, "path: "),
    # figures
    ("plots.training", {"trained": 3}, "trained: int has no training history"),
    ("plots.training", {"trained": "abc"}, "trained: str has no training history"),
    ("plots.training", {"trained": [LINE]}, "trained: has 1 steps"),
    (
        "plots.training",
        {"trained": [{"step": 1, "loss": "x"}]},
        "trained: line 0 of the history: expected a number for loss, got 'x'",
    ),
    ("plots.training", {"trained": [{"step": 1, "terms": 3}]}, "trained: line 0 of the history: expected terms"),
    ("plots.training", {"weights": 3}, "weights: expected a mapping of term names to numbers, got int"),
    ("plots.training", {"weights": {"b": 1.0}}, "weights: no term is called 'b'"),
    ("plots.training", {"weights": {"a": "x"}}, "weights: expected a number for a, got 'x'"),
    ("plots.pareto", {"records": 3}, "records: expected a list of records, got int"),
    ("plots.pareto", {"records": [1]}, "records: expected item 0 to have quality"),
    ("plots.pareto", {"records": [RECORD | {"bytes": "x"}]}, "records: expected a number as bytes of item 0, got 'x'"),
    ("plots.pareto", {"records": [RECORD | {"name": 3}]}, "records: expected a string as name of item 0, got 3"),
    ("plots.pareto", {"metric": 3}, "metric: no record has 3"),
    ("plots.masks", {"masks": 3}, "masks: int contains no mask values"),
    ("plots.masks", {"masks": {}}, "masks: contains no axis"),
    ("plots.masks", {"masks": {"hidden": torch.ones(2, 2)}}, "masks: 'hidden' has values of shape [2, 2]"),
    # recipes
    ("read_recipe", {"path": 3}, "path: expected the path of a recipe such as 'recipe.yaml', got int"),
    ("read_recipe", {"settings": "seed=1"}, "settings: expected a list of strings such as ['seed=1'], got 'seed=1'"),
    ("read_recipe", {"settings": [3]}, "settings: expected a list of strings such as ['seed=1'], got [3]"),
    ("read_recipe", {"settings": 3}, "settings: expected a list of strings such as ['seed=1'], got 3"),
    ("run", {"recipe": 3}, "recipe: expected a recipe or the path of one, got int"),
    ("run", {"recipe": {"version": 1}}, "recipe: expected a recipe or the path of one, got dict"),
    ("run", {"workdir": 3}, "workdir: expected a path such as 'runs/small', got int"),
    ("run", {"device": "tpu"}, "device: 'tpu' is not known; allowed: cpu, cuda"),
    ("run", {"console": 3}, "console: expected a rich.console.Console or None, got int"),
    # None
    ("save", {"out": None}, "out: expected a path such as 'runs/small', got None"),
    ("export_onnx", {"out": None}, "out: expected a path such as 'runs/small', got None"),
    ("export_onnx", {"model": None}, "model: expected the path of a model directory, got None"),
    ("load", {"path": None}, "path: expected the path of a model directory, got None"),
    ("finetune", {"data": None}, "data: NoneType is not supported"),
    ("finetune", {"terms": None}, "terms: expected a list of terms such as ['adaptive_kl'], got NoneType"),
    ("evaluate", {"model": None}, "model: expected a transformers model such as"),
    ("evaluate", {"data": None}, "data: NoneType is not supported"),
    ("evaluate", {"metrics": None}, "metrics: expected a list of some of perplexity"),
    ("benchmark", {"models": None}, "models: expected a list of models and directories, got NoneType"),
    ("score", {"axes": None}, "axes: expected a list of some of hidden, heads, ffn, got NoneType"),
    ("drop_layers", {"keep": None}, "keep: expected a number of layers or a list such as [0, 2, 5], got None"),
    ("prune", {"masks": None}, "masks: expected Masks, from learn_masks or score, got NoneType"),
    ("quantize_", {"weights": None}, "weights: "),
    ("Masks.load", {"path": None}, "path: expected a path such as 'runs/small', got None"),
    ("plots.training", {"trained": None}, "trained: NoneType has no training history"),
    ("plots.pareto", {"records": None}, "records: expected a list of records, got NoneType"),
    ("plots.masks", {"masks": None}, "masks: NoneType contains no mask values"),
    ("read_recipe", {"path": None}, "path: expected the path of a recipe such as 'recipe.yaml', got NoneType"),
    ("run", {"recipe": None}, "recipe: expected a recipe or the path of one, got NoneType"),
]


def _called(name: str, given: Mapping[str, Any], model: Any, path: Path) -> Any:
    arguments = GOOD[name] | given
    if name not in WITHOUT_MODEL and not name.startswith("plots."):
        arguments = {("student" if name == "distill" else "model"): model} | arguments
    made = {key: each.by(model, path) if isinstance(each, Made) else each for key, each in arguments.items()}
    return attrgetter(name)(compress)(**{key: each for key, each in made.items() if each is not OMITTED})


def _written(path: Path) -> set[str]:
    return {str(each.relative_to(path)) for each in path.rglob("*") if each.relative_to(path).parts[0] != "given"}


@pytest.fixture
def place(tmp_path: Path, model: Any) -> Path:
    """A directory with masks and a recipe."""
    compress.score(model).save(tmp_path / "masks.safetensors")
    (tmp_path / "recipe.yaml").write_text("version: 1\nname: a\n")
    return tmp_path


@pytest.mark.parametrize("name", [name for name in GOOD if name not in ("read_recipe", "run")])
def test_the_right_arguments_work(name: str, model: Any, place: Path) -> None:
    _called(name, {}, model, place)


@pytest.mark.parametrize(("name", "given", "start"), BAD, ids=[f"{name}-{start[:24]}" for name, _, start in BAD])
def test_a_wrong_argument_is_named_and_nothing_changes(
    name: str, given: Mapping[str, Any], start: str, model: Any, place: Path
) -> None:
    model.transformer.h[0].train()
    before, there = state(model), _written(place)
    with pytest.raises(CompressError) as told:
        _called(name, given, model, place)
    text = str(told.value)
    assert text.startswith(start) and "\n" not in text
    assert_same(before, state(model))
    assert _written(place) == there
