"""Beam search apart from any graph: exhaustive where it can be, and the stock library's text on random models."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.onnx.runtime.beams import beam_search, largest
from compress.onnx.runtime.sampling import Options, Rules

LogitsOf = Callable[[Any], Any]
PAD = 1


class Replay:
    """A decoder without a cache: it remembers the tokens of its rows and asks for the logits of the whole each time."""

    def __init__(self, logits_of: LogitsOf, prompts: Any) -> None:
        self.logits_of, self.tokens = logits_of, prompts[:, :0]
        self.rows: list[int] = []

    def feed(self, input_ids: Any) -> Any:
        self.tokens = np.concatenate([self.tokens, input_ids], axis=1)
        self.rows.append(len(input_ids))
        return self.logits_of(self.tokens).copy()

    def reorder(self, rows: Any) -> None:
        self.tokens = self.tokens[rows]


def searched(logits_of: LogitsOf, prompts: Any, ends: list[int], **options: Any) -> list[list[int]]:
    """New tokens of each prompt."""
    return searched_with(Replay(logits_of, prompts), prompts, ends, **options)


def searched_with(decoder: Replay, prompts: Any, ends: list[int], **options: Any) -> list[list[int]]:
    chosen = Options(**options)
    logits = decoder.feed(prompts)[:, -1]
    rules = Rules.of(chosen, prompts.shape[1], ends, logits.shape[-1])
    found = beam_search(decoder, logits, prompts, chosen, rules)
    assert max(decoder.rows) <= len(prompts) * chosen.num_beams
    return [row[prompts.shape[1] :].tolist() for row in found]


def table(seed: int, vocabulary: int) -> LogitsOf:
    """A model whose next token depends on all tokens before it, as if by chance."""

    def logits_of(tokens: Any) -> Any:
        rows = [np.random.default_rng([seed, *row]).normal(0, 2, (1, vocabulary)) for row in tokens.tolist()]
        return np.stack(rows).astype(np.float32)

    return logits_of


def every_text(logits_of: LogitsOf, prompt: list[int], ends: list[int], most: int) -> Iterator[tuple[Any, float]]:
    """Each text that can follow a prompt, with its log-probability."""

    @cache
    def log_probs(text: tuple[int, ...]) -> Any:
        logits = logits_of(np.array([[*prompt, *text]]))[0, -1].astype(np.float64)
        return logits - np.log(np.exp(logits).sum())

    for length in range(1, most + 1):
        for text in itertools.product(range(len(log_probs(()))), repeat=length):
            whole = text[-1] in ends or length == most
            if whole and not set(text[:-1]) & set(ends):
                yield text, sum(log_probs(text[:at])[token] for at, token in enumerate(text))


@settings(max_examples=50, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([(3, [0]), (4, [0, 2]), (3, [])]),
    st.floats(-3, 3),
    st.sampled_from([False, True, "never"]),
)
def test_wide_enough_beams_find_the_best_of_all(
    seed: int, alphabet: tuple[int, list[int]], penalty: float, early: bool | str
) -> None:
    vocabulary, ends = alphabet
    prompts, logits_of = np.array([[1, 1], [2, 1]]), table(seed, vocabulary)
    found = searched(
        logits_of, prompts, ends, max_new_tokens=4, num_beams=200, length_penalty=penalty, early_stopping=early
    )
    for prompt, text in zip(prompts.tolist(), found, strict=True):
        scores = {each: total / len(each) ** penalty for each, total in every_text(logits_of, prompt, ends, 4)}
        assert scores[tuple(text)] == pytest.approx(max(scores.values()), rel=1e-5)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5))
def test_prompts_are_searched_apart(seed: int, num_beams: int) -> None:
    logits_of, prompts = table(seed, 7), np.array([[1, 2], [3, 4], [5, 6], [1, 1]])
    options = {"max_new_tokens": 8, "num_beams": num_beams, "length_penalty": 0.5}
    alone = [searched(logits_of, prompt[None], [0, 3], **options)[0] for prompt in prompts]
    assert searched(logits_of, prompts, [0, 3], **options) == alone


def test_many_ends_among_the_likeliest_leave_as_many_beams() -> None:
    ends, num_beams, favoured = [2, 5, 7, 8], 3, np.zeros(40, np.float32)
    favoured[ends] = 6
    decoder = Replay(lambda tokens: table(0, 40)(tokens) + favoured, np.array([[1]]))
    options = {"num_beams": num_beams, "max_new_tokens": 6, "length_penalty": 2.0, "early_stopping": "never"}
    searched_with(decoder, np.array([[1]]), ends, **options)
    assert set(decoder.rows[1:]) == {num_beams}


LATE_WINS = {(): [0.45, 0.3, 0.25], (1,): [0.5, 0.45, 0.05], (2,): [0.1, 0.5, 0.4], (1, 1, 1, 1, 1): [0.98, 0.01, 0.01]}
"""Text 1 1 1 1 1 0 beats 0 per token, but when 0 and 1 0 are finished it lags behind both."""
SHORT_IS_PUNISHED_LESS = {
    (): [0.15, 0.8, 0.05],
    (1,): [0.02, 0.97, 0.01],
    (2,): [0.9, 0.05, 0.05],
    (1, 1): [0.98, 0.01, 0.01],
}
"""Text 1 1 0 times its length beats 0; had 1 1 to be 30 tokens long, it could not even beat 2 0."""


@pytest.mark.parametrize(
    ("probabilities", "penalty", "early", "expected"),
    [
        (LATE_WINS, 1.0, "never", [1, 1, 1, 1, 1, 0]),
        (LATE_WINS, 1.0, False, [0]),
        (LATE_WINS, 1.0, True, [0]),
        (SHORT_IS_PUNISHED_LESS, -1.0, "never", [1, 1, 0]),
        (SHORT_IS_PUNISHED_LESS, -1.0, False, [1, 1, 0]),
        (SHORT_IS_PUNISHED_LESS, -1.0, True, [0]),
    ],
)
def test_when_a_prompt_is_decided(
    probabilities: dict[tuple[int, ...], list[float]], penalty: float, early: bool | str, expected: list[int]
) -> None:
    def logits_of(tokens: Any) -> Any:
        rows = [tuple(row[1:]) for row in tokens.tolist()]
        others = [[0.005, 0.99, 0.005] if set(row) == {1} and len(row) < 5 else [1 / 3] * 3 for row in rows]
        found = [probabilities.get(row, other) for row, other in zip(rows, others, strict=True)]
        return np.log(np.array(found, np.float32))[:, None]

    options = {"max_new_tokens": 30, "num_beams": 2, "length_penalty": penalty, "early_stopping": early}
    assert searched(logits_of, np.array([[1]]), [0], **options) == [expected]


def test_one_beam_is_greedy() -> None:
    logits_of, text = table(0, 9), [1]
    while len(text) < 11:
        text.append(int(logits_of(np.array([text]))[0, -1].argmax()))
    assert searched(logits_of, np.array([[1]]), [], max_new_tokens=10, num_beams=1)[0] == text[1:]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.sampled_from([5, 640, 1000, 50_257]), st.integers(1, 10))
def test_the_largest_are_those_of_a_sort(seed: int, rows: int, vocabulary: int, count: int) -> None:
    generator = np.random.default_rng(seed)
    log_probs = generator.normal(0, 3, (rows, vocabulary)).round(1).astype(np.float32)  # many of them equal
    log_probs[0, generator.integers(0, vocabulary, vocabulary // 2)] = -np.inf
    log_probs[-1, 2:] = -np.inf
    sums = -generator.exponential(2, rows)
    totals = (sums[:, None] + log_probs).ravel()
    order = [at for at in np.argsort(-totals, kind="stable")[:count] if np.isfinite(totals[at])]
    parents, tokens, found = largest(log_probs, sums, count)
    assert (parents * vocabulary + tokens).tolist() == order
    assert found.tolist() == totals[order].tolist()


@pytest.mark.parametrize("penalty", [-1.0, 0.0, 1.0])
def test_where_nothing_may_follow_the_text_ends(penalty: float) -> None:
    options = {"max_new_tokens": 6, "num_beams": 2, "no_repeat_ngram_size": 1, "length_penalty": penalty}
    first, second = searched(table(0, 3), np.array([[0], [1]]), [], **options)
    assert (sorted(first), sorted(second)) == ([1, 2], [0, 2])
    assert searched(table(0, 3), np.array([[0, 1, 2]]), [], **options) == [[]]


def chosen_options(generator: np.random.Generator) -> dict[str, Any]:
    """Options of beam search, some of them left out."""
    most = int(generator.integers(1, 25))
    draws: dict[str, list[Any]] = {
        "length_penalty": [-1.0, 0.0, 0.5, 1.0, 2.0],
        "early_stopping": [False, True, "never"],
        "no_repeat_ngram_size": [0, 0, 1, 2, 3],
        "forced_bos_token_id": [None, 9],
        "forced_eos_token_id": [None, None, 7],
        "min_new_tokens": [None, None, most // 2],
        "min_length": [0, 0, most // 2],
    }
    options = {name: values[generator.integers(len(values))] for name, values in draws.items()}
    if options["min_new_tokens"] is not None:
        del options["min_length"]  # the stock library warns of both
    return {"num_beams": int(generator.choice([2, 4, 5])), "max_new_tokens": most} | options


def often(model: Any, prompts: Any, count: int) -> list[int]:
    """Tokens that the model likes, but not best, so that some texts end and others go on."""
    with torch.no_grad():
        logits = model(torch.from_numpy(prompts)).logits[:, -1].mean(0)
    return [int(token) for token in logits.argsort(descending=True) if token != PAD][3 : 3 + count]


@pytest.fixture(scope="module")
def lengths() -> Iterator[list[int]]:
    """The lengths of all texts that were compared; at the end they must have been of many kinds."""
    found: list[int] = []
    yield found
    assert len(set(found)) > min(10, len(found) // 8)


@pytest.mark.parametrize("seed", range(48))
def test_text_equals_that_of_the_stock_library(tiny_gpt2: Callable[..., Any], lengths: list[int], seed: int) -> None:
    generator, model = np.random.default_rng(seed), tiny_gpt2(seed=seed, vocab=50 + seed, layers=1)
    options, width = chosen_options(generator), int(generator.integers(1, 6))
    prompts = generator.integers(2, model.config.vocab_size, (3, width))
    prompts[np.arange(width) < generator.integers(0, width, (3, 1))] = PAD
    eos = often(model, prompts, int(generator.integers(1, 4)))

    def logits_of(tokens: Any) -> Any:
        mask = (tokens != PAD).cumsum(-1) > 0
        positions = (mask.cumsum(-1) - 1).clip(min=0)
        inputs = {"input_ids": tokens, "attention_mask": mask.astype(np.int64), "position_ids": positions}
        with torch.no_grad():
            return model(**{name: torch.from_numpy(value) for name, value in inputs.items()}).logits.numpy()

    expected = model.generate(
        torch.from_numpy(prompts), attention_mask=torch.from_numpy((prompts != PAD).astype(np.int64)),
        do_sample=False, pad_token_id=PAD, eos_token_id=eos, **options,
    )  # fmt: skip
    found = searched(logits_of, prompts, eos, **options)
    lengths += map(len, found)
    longest = max(map(len, found))
    assert [text + [PAD] * (longest - len(text)) for text in found] == expected[:, width:].tolist()
