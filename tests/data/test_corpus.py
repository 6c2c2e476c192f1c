from __future__ import annotations

import json
from pathlib import Path

import pytest

from compress.data import Source
from compress.data.corpus import read_corpus
from compress.errors import DataError


def write_rows(directory: Path) -> None:
    rows = [{"q": "who", "a": "you", "ids": [1, 2]}, {"q": "when", "a": "now", "ids": [3]}]
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "lines.txt").write_text("one\ntwo\n")


def read(directory: Path, **source: str) -> list[str]:
    write_rows(directory)
    return read_corpus(Source.model_validate(source), directory)


def test_lines_are_texts(tmp_path: Path) -> None:
    assert read(tmp_path, text="lines.txt") == ["one", "two"]


def test_a_tokenizer_learns_from_the_text_that_is_scored(tmp_path: Path) -> None:
    write_rows(tmp_path)
    (tmp_path / "lines.txt").write_text("  one \n\ttwo\n")
    found = [
        read_corpus(Source.model_validate({"text": "lines.txt", "strip": strip}), tmp_path) for strip in (False, True)
    ]
    assert found == [["  one ", "\ttwo"], ["one", "two"]]


def test_pairs_give_both_sides(tmp_path: Path) -> None:
    assert read(tmp_path, json="rows.jsonl", source="q", target="a") == ["who", "you", "when", "now"]
    prompts = read(tmp_path, json="rows.jsonl", prompt="q", response="a")
    assert [text.strip() for text in prompts] == ["who", "you", "when", "now"]


def test_token_ids_hold_no_text(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="^contains token ids"):
        read(tmp_path, json="rows.jsonl", input_ids="ids")
