"""Problems are values: a path and a text. No layer finds the path in the text."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import compress
from compress.errors import DataError, ModelError, UserError, located
from compress.measure.speed import Speed
from compress.pipeline import Inputs, make_plan
from compress.problem import Problem, show
from compress.recipe import read_recipe
from compress.stages.distill import Distill
from compress.terms.logits import AdaptiveKL

RECIPE = """version: 1
name: lines
model: {config: {model_type: gpt2, n_layer: 1, n_embd: 16, n_head: 2, n_positions: 32, vocab_size: 67}}
data: {train: {json: rows.jsonl, input_ids: ids}}
stages:
  - type: distill
    teacher: base
    terms:
      - type: cross_entropy
      - type: adaptive_kl
        head_mass: 0.5
    train:
      steps: 2
measure:
  - size
  - type: speed
    prompt_tokens: 4
    new_tokens: 4
"""


def test_each_owner_puts_its_path_before_a_problem() -> None:
    problem = Problem(("heads",), "5 does not divide 16")
    assert str(problem) == "heads: 5 does not divide 16"
    assert problem.inside("terms", 0).inside("stages", 1).path == ("stages", 1, "terms", 0, "heads")
    assert str(problem.inside("terms", 0).inside("stages", 1)) == "stages[1].terms[0].heads: 5 does not divide 16"
    assert str(Problem((), "teacher: is a word")) == "teacher: is a word"
    assert show(()) == "" and show(("measure", 2, "of")) == "measure[2].of"


def test_an_error_carries_its_problem() -> None:
    with pytest.raises(DataError) as caught, located("data"), located("train"):
        raise DataError(Problem(("block",), "64 is too many"))
    assert caught.value.problem == Problem(("data", "train", "block"), "64 is too many")
    assert str(caught.value) == "data.train.block: 64 is too many"
    assert copy.copy(caught.value).problem == caught.value.problem
    assert ModelError("keep: is only text").problem == Problem((), "keep: is only text")
    with pytest.raises(ValueError, match="^as it was$"), located("data"):
        raise ValueError("as it was")


@pytest.mark.parametrize(
    ("kind", "problem", "expected"),
    [
        (AdaptiveKL, Problem(("head_mass",), "train and teacher differ"), "11: stages[0].terms[1].head_mass: train"),
        (AdaptiveKL, Problem((), "teacher: a word"), "10: stages[0].terms[1]: teacher: a word"),
        (AdaptiveKL, Problem(("weight",), "is 1 by default"), "10: stages[0].terms[1].weight: is 1 by default"),
        (Distill, Problem(("train", "steps"), "teacher first"), "13: stages[0].train.steps: teacher first"),
        (Distill, Problem((), "terms and teacher differ"), "6: stages[0]: terms and teacher differ"),
        (Speed, Problem(("new_tokens",), "of and type"), "18: measure[1].new_tokens: of and type"),
    ],
)
def test_a_problem_is_found_at_its_path_whatever_its_text_starts_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type, problem: Problem, expected: str
) -> None:
    """Most texts start with the name of a field, and the problem is in another one."""
    (tmp_path / "rows.jsonl").write_text('{"ids": [1, 2, 3]}\n')
    path = tmp_path / "lines.yaml"
    path.write_text(RECIPE)
    make_plan(Inputs(read_recipe(path), tmp_path / "work"))
    monkeypatch.setattr(kind, "problems", lambda *_: iter([problem]))
    with pytest.raises(UserError) as caught:
        make_plan(Inputs(read_recipe(path), tmp_path / "work"))
    assert str(caught.value).startswith(f"{path}:{expected}")


ARGUMENTS: list[tuple[Callable[[Any, Any], Any], str]] = [
    (lambda m, rows: compress.evaluate(m, rows, metrics=["rouge"]), "metrics: rouge compares generated text with"),
    (lambda m, rows: compress.evaluate(m, rows, metrics=[]), "metrics: "),
    (
        lambda m, rows: compress.finetune(m, rows, terms=["cross_entropy", 3], steps=1),
        "terms[1]: expected the name of a term such as 'adaptive_kl', got int",
    ),
    (lambda m, rows: compress.finetune(m, rows, terms=[{"type": "cross_entropy", "x": 0}], steps=1), "terms[0]: unk"),
    (lambda m, rows: compress.finetune(m, [{"input_ids": [9]}], steps=1), "data: row 0 has one token"),
]


@pytest.mark.parametrize(("call", "text"), ARGUMENTS)
def test_the_functions_name_their_arguments(call: Callable[[Any, Any], Any], text: str, tiny_gpt2: Any) -> None:
    with pytest.raises(UserError) as caught:
        call(tiny_gpt2(), [{"input_ids": [1, 2, 3, 4]}])
    assert str(caught.value).startswith(text)
