"""A recipe's ``data`` -> splits, all of them read and checked before any work."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.data.interface import ModelInterface
from compress.data.sources import DataSpec
from compress.data.split import Split
from compress.errors import DataError

_PLACES = {"text", "json", "csv", "parquet", "hub", "config", "split"}


@dataclass(frozen=True, eq=False)
class Data:
    """The splits of a run, and a digest of what made them: rows as read, spec (but no paths), tokenizer, interface."""

    train: Split | None
    eval: Split | None
    test: Split | None
    spec: DataSpec
    digest: str


def open_data(spec: DataSpec, *, tokenizer: Any | None, model: ModelInterface, base: Path) -> Data:
    """Read, tokenize and check every split.

    Args:
        spec: what the recipe says.
        tokenizer: a transformers tokenizer, or None where all rows are ready tokens.
        model: what the rows must fit.
        base: the directory that relative paths start from (the recipe's).

    Raises:
        DataError: a file, column or row that is missing, empty or does not fit, in one line that names it.
    """
    # imports `datasets`, which takes a second; a recipe can be read without it
    from compress.data.encoding import Encoder

    if spec.block is not None and spec.block > model.context:
        raise DataError(f"data.block is {spec.block}, but the model takes {model.context} tokens at most")
    for name in ("max_source", "max_target"):
        longest = getattr(spec, name)
        if model.task == "seq2seq" and longest is not None and longest > model.context:
            raise DataError(f"data.{name} is {longest}, but the model takes {model.context} tokens at most")
    splits: dict[str, Split | None] = {}
    content: list[object] = [_settings(spec), tokenizer_digest(tokenizer), vars(model)]
    for name in ("train", "eval", "test"):
        source, splits[name] = getattr(spec, name), None
        if source is not None:
            splits[name], rows = Encoder(spec, model, tokenizer, f"data.{name}").split(source, spec.start(base))
            content.append({name: rows})
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return Data(**splits, spec=spec, digest=digest)


def tokenizer_digest(tokenizer: Any | None) -> str:
    """Hash what a tokenizer does to text: its whole definition, but not how it was last asked to pad or truncate."""
    if tokenizer is None:
        return ""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    content = {key: value for key, value in content.items() if key not in ("truncation", "padding")}
    settings = {"content": content, "special": {key: str(value) for key, value in tokenizer.special_tokens_map.items()}}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _settings(spec: DataSpec) -> dict[str, Any]:
    settings = spec.model_dump(mode="json", by_alias=True, exclude={"folder"})
    for name in ("train", "eval", "test"):
        if settings[name] is not None:
            settings[name] = {key: value for key, value in settings[name].items() if key not in _PLACES}
    return settings
