"""Encode texts in parts, because a tokenizer keeps much more per token than its id while it works."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int32]

_PIECE = 1 << 13  # least number of characters in a part of running text
_TOGETHER = 16  # parts of running text per call, so that the tokenizer uses every core
_TEXTS = 1024  # separate texts per call
_CUT = re.compile(r"(?<=[\w!-~])(?=[ \n])")


def encode_stream(tokenizer: Any, text: str) -> Ids:
    """Return the tokens of one text without special tokens: equal to one call of the tokenizer, with less memory."""
    pieces = list(_pieces(text)) if cuts_before_spaces(tokenizer) else [text]
    parts = [
        np.array(ids, np.int32)
        for at in range(0, len(pieces), _TOGETHER)
        for ids in _encode(tokenizer, pieces[at : at + _TOGETHER], special=False)
    ]
    return np.concatenate(parts)


def encode_each(tokenizer: Any, texts: list[str], *, special: bool) -> list[list[int]]:
    """Return the tokens of each text, with the tokenizer's special tokens if ``special``."""
    starts = range(0, len(texts), _TEXTS)
    return [ids for at in starts for ids in _encode(tokenizer, texts[at : at + _TEXTS], special=special)]


def cuts_before_spaces(tokenizer: Any) -> bool:
    """True if cutting text between a word and a space or newline changes no token.

    The pattern of byte-level BPE (GPT-2) ends a word before each space without looking back, and merges stay inside a
    word. So cutting is safe if only this pattern splits the text, if nothing is prepended or normalized, and if no
    added token contains spaces.
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
