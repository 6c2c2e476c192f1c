"""Encoding part by part gives the tokens of one call, and takes little memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from compress.data import tokenizing as module
from compress.data.tokenizing import cuts_before_spaces, encode_each, encode_stream
from compress.models.families.gpt2 import GPT2
from compress.models.scratch import train_bpe

ROOT = Path(__file__).parents[2]
SPACED = [
    "a b\n",
    "\n\n",
    " \n",
    "\n b",
    "a\n\n\tb ",
    "don't\n'll",
    "0\n1",
    "é\n。",
    "\u2028\n\x0c",
    "<|endoftext|>\n",
] * 3

texts = st.lists(
    st.sampled_from(["a", "b", " ", "\n", "\n", "\n\n", "\t", "\r", "\x0b", "\x1c", "\x85", "\xa0", "\u180e", "\u2028",
                     "'s", "'", "1", ".", "é", "。", "the", "<|endoftext|>"]), max_size=40,
).map("".join)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """A tokenizer with merges across spaces of every kind."""
    return train_bpe([*SPACED, "the cat sat\n\n  the end.\n"] * 9, 290, GPT2)


@pytest.fixture(scope="module", params=["plain", "prefix", "eager", "rewritten", "whole"])
def any_tokenizer(request: pytest.FixtureRequest) -> Any:
    """Tokenizers that text may, and may not, be cut for."""
    made = train_bpe([*SPACED, "the cat sat\n\n  the end.\n"] * 9, 290, GPT2)
    if request.param == "eager":
        made.add_tokens(AddedToken("the", lstrip=True, rstrip=True))
    backend, prefix = made.backend_tokenizer, request.param == "prefix"
    if prefix:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    if request.param == "rewritten":
        backend.normalizer = normalizers.Strip()
    if request.param == "whole":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", add_prefix_space=prefix)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(text=texts, size=st.integers(1, 12))
def test_parts_give_the_tokens_of_the_whole(any_tokenizer: Any, text: str, size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_PIECE", size)
        patch.setattr(module, "_TOGETHER", 3)
        found = encode_stream(any_tokenizer, text)
    assert found.tolist() == any_tokenizer(text, add_special_tokens=False)["input_ids"]
    assert found.dtype == np.int32


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 100, 5000])
def test_parts_of_real_text_give_the_tokens_of_the_whole(
    tokenizer: Any, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plays = (ROOT / "recipes/quickstart/shakespeare.txt").read_text(encoding="utf-8")[:200_000]
    code = (ROOT / "tests/data/test_tokenizing.py").read_text(encoding="utf-8")
    monkeypatch.setattr(module, "_PIECE", size)
    for text in (plays, code, code.replace("\n", " \n\n "), plays.replace("\n", " \n")):
        assert encode_stream(tokenizer, text).tolist() == tokenizer(text)["input_ids"]
    assert len(list(module._pieces(code))) > 2 or size == 5000


def test_text_is_cut_only_where_the_tokenizer_allows(any_tokenizer: Any, request: pytest.FixtureRequest) -> None:
    assert cuts_before_spaces(any_tokenizer) == ("plain" in request.node.name)
    assert not cuts_before_spaces(object())


def test_texts_of_their_own_are_encoded_in_order(seq2seq_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TEXTS", 3)
    written = [f"the cat {n}" for n in range(10)]
    for special in (True, False):
        whole = seq2seq_tokenizer(written, add_special_tokens=special)["input_ids"]
        assert encode_each(seq2seq_tokenizer, written, special=special) == whole


@pytest.mark.slow
def test_opening_running_text_takes_little_memory(tmp_path: Path) -> None:
    """Peak memory beyond the libraries, per byte of text, in a fresh process."""
    plays = (ROOT / "recipes/quickstart/shakespeare.txt").read_text(encoding="utf-8")
    (tmp_path / "text.txt").write_text(plays * 6, encoding="utf-8")
    (tmp_path / "few.txt").write_text(plays[:1000], encoding="utf-8")
    script = """
import resource, sys
from pathlib import Path
from transformers import AutoTokenizer
import compress.data.encoding
from compress.data import DataSpec, ModelInterface, open_data
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
tokenizer, base = AutoTokenizer.from_pretrained(sys.argv[2]), Path(sys.argv[1])
model = ModelInterface("causal", 128, len(tokenizer))
spec = lambda name: DataSpec.model_validate({"train": {"text": name}})
open_data(spec("few.txt"), tokenizer=tokenizer, model=model, base=base)  # what a first call loads
before = peak()
data = open_data(spec("text.txt"), tokenizer=tokenizer, model=model, base=base)
print((peak() - before) / (base / "text.txt").stat().st_size)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), str(ROOT / "recipes/quickstart/teacher")],
        capture_output=True, text=True, cwd=ROOT, check=True,
    )  # fmt: skip
    assert float(done.stdout) < 30
