import json
from pathlib import Path
from typing import Any

import pytest

from compress.data import ModelInterface
from compress.models.families.bart import BART
from compress.models.families.gpt2 import GPT2
from compress.models.scratch import train_bpe

LINES = ["the cat sat on the mat", "a dog ran far", "", "the cats and the dogs ate the food on the mat"]


@pytest.fixture(scope="session")
def causal_tokenizer() -> Any:
    return train_bpe(LINES * 3, 270, GPT2)


@pytest.fixture(scope="session")
def seq2seq_tokenizer() -> Any:
    return train_bpe(LINES * 3, 270, BART)


@pytest.fixture
def causal(causal_tokenizer: Any) -> ModelInterface:
    return ModelInterface("causal", context=64, vocabulary=len(causal_tokenizer), eos=causal_tokenizer.eos_token_id)


@pytest.fixture
def seq2seq(seq2seq_tokenizer: Any) -> ModelInterface:
    tokens = seq2seq_tokenizer
    return ModelInterface("seq2seq", 64, len(tokens), tokens.pad_token_id, tokens.eos_token_id, tokens.eos_token_id)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One small file of each kind."""
    rows = [
        {
            "question": "the cat?",
            "answer": "sat",
            "more": ["sat", "ate"],
            "hint": None,
            "ids": [1, 2, 3],
            "labels": [-100, 2, 3],
        },
        {"question": "a dog?", "answer": "ran far", "more": ["ran"], "hint": "far", "ids": [4, 5], "labels": [4, 5]},
    ]
    (tmp_path / "lines.txt").write_text("\n".join(f" {line} " for line in LINES) + "\n")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "rows.csv").write_text("question,answer\n007,NA\nthe cat?,\n")
    return tmp_path
