"""The text of a source of any layout, to train a tokenizer on."""

from __future__ import annotations

from pathlib import Path

from compress.data.readers import read_pairs, read_text
from compress.data.sources import Source
from compress.errors import DataError


def read_corpus(source: Source, base: Path) -> list[str]:
    """Return every text of ``source``, including prompts and responses. Raises DataError for rows of token ids."""
    if source.layout == "tokens":
        raise DataError("contains token ids, but a tokenizer is trained on text")
    if source.layout == "text":
        return read_text(source, base)
    return [text for pair in read_pairs(source, base) for text in (pair.text, *pair.references)]
