"""Choosing tokens: the same distributions as the stock library's, drawn as often as they say."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from compress.errors import UserError
from compress.onnx.runtime.sampling import Options, choose, probabilities


@settings(max_examples=60, deadline=None)
@given(st.floats(0.2, 3), st.integers(0, 12), st.floats(0.05, 1), st.integers(0, 2**32 - 1))
def test_probabilities_equal_the_stock_warpers(temperature: float, top_k: int, top_p: float, seed: int) -> None:
    logits = np.random.default_rng(seed).normal(0, 2, (3, 10)).astype(np.float32)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    expected = torch.softmax(warpers(None, torch.from_numpy(logits).double()), -1).numpy()
    got = probabilities(logits, Options(do_sample=True, temperature=temperature, top_k=top_k, top_p=top_p))
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_tokens_are_drawn_as_often_as_their_probability() -> None:
    logits = np.log(np.array([0.5, 0.25, 0.15, 0.1]))
    drawn = choose(np.tile(logits, (20_000, 1)), Options(do_sample=True), np.random.default_rng(0))
    np.testing.assert_allclose(np.bincount(drawn) / 20_000, [0.5, 0.25, 0.15, 0.1], atol=0.015)


def test_a_token_without_probability_is_never_drawn() -> None:
    logits = np.array([[-np.inf, 0.0, -np.inf, 1.0, -np.inf]])
    class_ends = type("Ends", (), {"random": lambda self, shape: np.full(shape, self.value)})
    for value, expected in ((0.0, 1), (np.nextafter(1, 0), 3)):
        generator: Any = class_ends()
        generator.value = value
        assert choose(logits, Options(do_sample=True), generator) == [expected]


def test_greedy_takes_the_first_of_equal_logits() -> None:
    assert choose(np.array([[0.0, 2.0, 2.0]]), Options(), np.random.default_rng(0)).tolist() == [1]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("temperature", 0), ("top_p", 0), ("top_p", 1.5), ("top_k", -1), ("max_new_tokens", 0), ("max_new_tokens", 1.5),
        ("num_beams", 0), ("num_beams", 2.0), ("length_penalty", math.nan), ("length_penalty", 51),
        ("early_stopping", "always"), ("early_stopping", 1), ("no_repeat_ngram_size", -1), ("min_length", -1),
        ("min_new_tokens", -2), ("seed", -1), ("eos_token_id", "end"), ("forced_bos_token_id", 0.5),
        ("forced_eos_token_id", (2, None)), ("temperature", math.inf), ("temperature", math.nan), ("temperature", "a"),
        ("temperature", None), ("top_p", None), ("top_p", True), ("length_penalty", "long"), ("do_sample", "no"),
        ("do_sample", 1), ("top_k", True), ("max_new_tokens", "3"), ("eos_token_id", True), ("num_beams", None),
    ],
)  # fmt: skip
def test_impossible_options_are_named(option: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"^{option}: {re.escape(repr(value))} is not [^\n]*$"):
        Options(**{option: value})


def test_the_smallest_temperature_takes_the_likeliest_without_a_warning() -> None:
    logits = np.array([[-1.0, 700.0, 699.0, -np.inf], [3.0, 3.0, 2.0, 1.0]], np.float32)
    found = probabilities(logits, Options(do_sample=True, temperature=5e-324))
    assert found.tolist() == [[0, 1, 0, 0], [0.5, 0.5, 0, 0]]


def test_an_option_that_does_not_exist_is_named() -> None:
    with pytest.raises(
        UserError, match="^max_length: is not an option of generation; allowed: max_new_tokens, [^\n]*$"
    ):
        Options.read({"max_length": 3})


def test_beams_do_not_draw() -> None:
    with pytest.raises(UserError, match="num_beams: 2 is not 1, the only number allowed with do_sample"):
        Options(num_beams=2, do_sample=True)
