"""Texts -> token ids, a part at a time, so that what a tokenizer notes of each token never exists for all of them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int32]

_PIECE = 1 << 13  # characters of running text that are one part at least
_TOGETHER = 16  # parts of running text that a tokenizer sees at a time, so that it can use every core
_TEXTS = 1024  # texts of their own that it sees at a time
_CUT = re.compile(r"(?<=[\w!-~])(?=[ \n])")


def encode_stream(tokenizer: Any, text: str) -> Ids:
    """The tokens of one text, without special tokens: what one call would give, at a fraction of its memory."""
    pieces = list(_pieces(text)) if cuts_before_spaces(tokenizer) else [text]
    parts = [
        np.array(ids, np.int32)
        for at in range(0, len(pieces), _TOGETHER)
        for ids in _encode(tokenizer, pieces[at : at + _TOGETHER], special=False)
    ]
    return np.concatenate(parts)


def encode_each(tokenizer: Any, texts: list[str], *, special: bool) -> list[list[int]]:
    """The tokens of each text, with the tokenizer's special tokens around them if ``special``."""
    starts = range(0, len(texts), _TEXTS)
    return [ids for at in starts for ids in _encode(tokenizer, texts[at : at + _TEXTS], special=special)]


def cuts_before_spaces(tokenizer: Any) -> bool:
    """True where text may be cut between a word and a space or newline without changing a token.

    The pattern of byte-level BPE (GPT-2's) ends a word before any space and never looks back, and merges stay inside a
    word. So it holds where this pattern alone splits the text, nothing is put before it or rewritten in it, and no
    added token takes spaces in.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return False
    rules = json.loads(backend.to_str())
    split = rules["pre_tokenizer"] or {}
    plain = split.get("type") == "ByteLevel" and split.get("use_regex", True) and not split["add_prefix_space"]
    spaced = any(
        token["lstrip"] or token["rstrip"] or re.search(r"\s", token["content"]) for token in rules["added_tokens"]
    )
    return bool(plain and rules["normalizer"] is None and not spaced and not rules["model"].get("dropout"))


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while (cut := _CUT.search(text, start + _PIECE)) is not None:
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]


def _encode(tokenizer: Any, texts: list[str], *, special: bool) -> list[list[int]]:
    options = {"truncation": False, "padding": False, "return_attention_mask": False, "verbose": False}
    return list(tokenizer(texts, add_special_tokens=special, **options)["input_ids"])
