"""No repeated n-grams and a least length, as summaries are decoded with: the same in both runtimes."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from pydantic import ValidationError

from compress.artifact import Artifact
from compress.generation.settings import Decoding
from compress.generation.subject import subject_of
from compress.registry import MEASUREMENTS, STAGES

PROMPTS = [[5, 9, 12, 40], [7, 8], [30, 31, 32, 33, 34, 35]]


def said(artifact: Artifact, extra_ends: list[int], **written: Any) -> list[list[int]]:
    subject: Any = subject_of(artifact, "cpu")
    subject.ends = [*subject.ends, *extra_ends]
    found: list[list[int]] = subject.generate(PROMPTS, Decoding.model_validate({"max_new_tokens": 14} | written), 0)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("num_beams", [1, 4])
@pytest.mark.parametrize("family", ["gpt2", "bart"])
def test_torch_and_onnx_say_the_same_under_both_rules(family: str, num_beams: int, request: Any) -> None:
    base, onnx = (request.getfixturevalue(name) for name in (family, f"{family}_onnx"))
    free = said(base, [], num_beams=num_beams)
    end = free[0][2]
    rules = {"num_beams": num_beams, "no_repeat_ngram_size": 2, "min_new_tokens": 6}
    both = [said(artifact, [end], **rules) for artifact in (base, onnx)]
    assert both[0] == both[1]
    start = len if family == "gpt2" else (lambda prompt: 0)  # the prompt is part of the text of a decoder alone
    for prompt, row in zip(PROMPTS, both[0], strict=True):
        bigrams = list(pairwise([*prompt[len(prompt) - start(prompt) :], *row]))
        assert len(bigrams) == len(set(bigrams))
        assert len(row) >= 6
    without = {name: said(base, [end], **(rules | {name: 0})) for name in ("no_repeat_ngram_size", "min_new_tokens")}
    assert min(map(len, without["min_new_tokens"])) < 6
    assert without["no_repeat_ngram_size"] != both[0]


def test_the_rules_are_recorded_where_they_take_part() -> None:
    assert not {"no_repeat_ngram_size", "min_new_tokens"} & {
        *Decoding().conditions(),
        *Decoding(do_sample=True).conditions(),
    }
    rules = {"no_repeat_ngram_size": 3, "min_new_tokens": 5}
    for more in ({}, {"num_beams": 4}, {"do_sample": True}):
        decoding = Decoding.model_validate(rules | more)
        assert rules.items() <= decoding.conditions().items()
        assert {"no_repeat_ngram_size": 3, "min_new_tokens": 5}.items() <= decoding.options().items()
    assert "min_new_tokens" not in Decoding(no_repeat_ngram_size=3).options()


def test_results_made_without_the_rules_keep_their_keys() -> None:
    for config in (
        STAGES.read({"type": "seq_kd", "decoding": {"num_beams": 4}}),
        MEASUREMENTS.read({"type": "quality", "metric": "rouge", "decoding": {"num_beams": 4}}),
    ):
        assert not {"no_repeat_ngram_size", "min_new_tokens"} & set(config.model_dump(mode="json")["decoding"])
    with_rules = STAGES.read({"type": "seq_kd", "decoding": {"no_repeat_ngram_size": 3, "min_new_tokens": 5}})
    assert {"no_repeat_ngram_size": 3, "min_new_tokens": 5}.items() <= with_rules.model_dump(mode="json")[
        "decoding"
    ].items()


def test_a_text_cannot_have_more_tokens_than_it_may() -> None:
    with pytest.raises(ValidationError, match="min_new_tokens: 9 is more than max_new_tokens: 8"):
        Decoding(max_new_tokens=8, min_new_tokens=9)


@pytest.mark.parametrize("temperature", [0, 1e-320, float("inf"), float("nan")])
def test_a_temperature_is_one_that_both_runtimes_can_divide_by(temperature: float) -> None:
    with pytest.raises(ValidationError, match="temperature"):
        Decoding(do_sample=True, temperature=temperature)
