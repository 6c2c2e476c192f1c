"""Responses come in the order of the prompts, whatever the batches are, and continue from what is done."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.data import Example
from compress.generation.responses import SAMPLES, responses, samples

PROMPTS = st.lists(st.lists(st.integers(0, 9), max_size=5), max_size=12)


def doubled(prompts: Sequence[list[int]], number: int) -> list[list[int]]:
    return [[2 * token for token in prompt] for prompt in prompts]


@pytest.mark.slow
@given(PROMPTS, st.integers(1, 5), st.booleans())
def test_each_prompt_has_its_own_response(prompts: list[list[int]], size: int, longest_first: bool) -> None:
    found = responses(prompts, size, doubled, longest_first=longest_first)
    assert found == doubled(prompts, 0)


@given(PROMPTS, st.integers(1, 5), st.booleans())
def test_batches_are_numbered_and_sorted_by_length(prompts: list[list[int]], size: int, longest_first: bool) -> None:
    seen: list[list[int]] = []

    def generate(batch: Sequence[list[int]], number: int) -> list[list[int]]:
        assert number == len(seen)
        seen.append([len(prompt) for prompt in batch])
        return doubled(batch, number)

    responses(prompts, size, generate, longest_first=longest_first)
    lengths = [length for batch in seen for length in batch]
    assert lengths == sorted(map(len, prompts), reverse=longest_first)
    assert all(len(batch) == size for batch in seen[:-1])


@pytest.mark.slow
@given(PROMPTS, st.integers(1, 5), st.integers(0, 12))
def test_a_continued_run_gives_the_same_and_repeats_no_batch(prompts: list[list[int]], size: int, stop: int) -> None:
    straight: list[list[list[int]]] = []
    whole = responses(prompts, size, lambda batch, n: [[n, *p] for p in batch], finished=straight.append)
    calls: list[int] = []

    def generate(batch: Sequence[list[int]], number: int) -> list[list[int]]:
        calls.append(number)
        return [[number, *prompt] for prompt in batch]

    assert responses(prompts, size, generate, done=straight[:stop]) == whole
    assert calls == list(range(min(stop, len(straight)), len(straight)))


@pytest.mark.parametrize("rows", [1, SAMPLES, SAMPLES + 1, 1000])
def test_kept_rows_are_spread_evenly_from_the_first_on(rows: int) -> None:
    examples = [Example([at], f"in {at}", (f"ref {at}",)) for at in range(rows)]
    kept = samples(examples, [f"out {at}" for at in range(rows)])
    numbers = [sample["row"] for sample in kept]
    assert len(numbers) == len(set(numbers)) == min(rows, SAMPLES)
    assert numbers[0] == 0
    steps = {after - before for before, after in pairwise(numbers)}
    assert max(steps, default=1) - min(steps, default=1) <= 1
    for sample in kept:
        at = sample["row"]
        assert sample == {"row": at, "input": f"in {at}", "references": [f"ref {at}"], "output": f"out {at}"}
