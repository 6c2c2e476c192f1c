"""A tiny model, a tokenizer of its vocabulary, and a few lines of text."""

from __future__ import annotations

from typing import Any

import pytest

from compress.models.families.gpt2 import GPT2
from compress.models.scratch import train_bpe

LINES = [f"the {animal} sees {number} birds and the cat" for animal in ("dog", "cow", "hen") for number in range(12)]


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return train_bpe(LINES, 280, GPT2)


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return LINES


@pytest.fixture
def model(tiny_gpt2: Any) -> Any:
    return tiny_gpt2(vocab=280, positions=32).eval()
