"""What may come next: the same scores as the stock library's processors leave, for greedy, sampling and beams."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
)

from compress.errors import UserError
from compress.onnx.runtime.sampling import Options, Rules

VOCABULARY = 6


def stock(prompt: int, options: dict[str, Any], ends: list[int]) -> LogitsProcessorList:
    found = LogitsProcessorList()
    if options["no_repeat_ngram_size"]:
        found.append(NoRepeatNGramLogitsProcessor(options["no_repeat_ngram_size"]))
    if ends and options["min_new_tokens"] is None and options["min_length"]:
        found.append(MinLengthLogitsProcessor(options["min_length"], ends))
    if ends and options["min_new_tokens"]:
        found.append(MinNewTokensLengthLogitsProcessor(prompt, options["min_new_tokens"], ends))
    if options["forced_bos_token_id"] is not None:
        found.append(ForcedBOSTokenLogitsProcessor(options["forced_bos_token_id"]))
    if options["forced_eos_token_id"] is not None:
        found.append(ForcedEOSTokenLogitsProcessor(prompt + options["max_new_tokens"], options["forced_eos_token_id"]))
    return found


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(
    st.fixed_dictionaries(
        {
            "no_repeat_ngram_size": st.integers(0, 4),
            "min_length": st.integers(0, 9),
            "min_new_tokens": st.none() | st.integers(0, 5),
            "forced_bos_token_id": st.none() | st.integers(0, VOCABULARY - 1),
            "forced_eos_token_id": st.none() | st.sampled_from([2, [1, 3]]),
            "max_new_tokens": st.integers(1, 4),
        }
    ),
    st.sampled_from([[], [2], [0, 5]]),
    st.integers(1, 7),
    st.integers(0, 3),
    st.integers(0, 2**32 - 1),
)
def test_scores_equal_those_of_the_stock_processors(
    options: dict[str, Any], ends: list[int], prompt: int, done: int, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    tokens = generator.integers(0, 3, (3, prompt + done))  # of few tokens, so that they repeat
    scores = generator.normal(size=(3, VOCABULARY)).astype(np.float32)
    expected = stock(prompt, options, ends)(torch.from_numpy(tokens), torch.from_numpy(scores)).numpy()
    Rules.of(Options(**options), prompt, (*ends, -1, VOCABULARY), VOCABULARY).apply(scores, tokens)
    np.testing.assert_array_equal(scores, expected)


def test_forced_tokens_must_be_known() -> None:
    for option in ({"forced_bos_token_id": 6}, {"forced_eos_token_id": [2, 7]}):
        with pytest.raises(UserError, match=r"forced_.os_token_id: .* is not a token of the vocabulary, 0 to 5"):
            Rules.of(Options(**option), 1, (2,), VOCABULARY)
