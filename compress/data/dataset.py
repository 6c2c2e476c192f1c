"""Read and check all splits of a recipe's ``data`` before any work."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from compress.data.interface import ModelInterface
from compress.data.sources import DataSpec
from compress.data.split import Split
from compress.errors import DataError, located
from compress.problem import Problem

_PLACES = {"text", "json", "csv", "parquet", "hub", "config", "split"}


@dataclass(frozen=True, eq=False)
class Data:
    """The splits of a run. ``digest`` covers rows, settings (without paths), tokenizer and model interface."""

    train: Split | None
    eval: Split | None
    test: Split | None
    spec: DataSpec
    digest: str


def open_data(spec: DataSpec, *, tokenizer: Any | None, model: ModelInterface, base: Path) -> Data:
    """Read, tokenize and check every split.

    Args:
        spec: the ``data`` section of the recipe.
        tokenizer: a transformers tokenizer, or None if all rows are token ids.
        model: the interface that the rows must fit.
        base: the directory of the recipe, where relative paths start.

    Raises:
        DataError: a file, column or row that is missing, empty or does not fit. Its path starts at ``data``.
    """
    # imports `datasets`, which takes a second; reading a recipe does not need it
    from compress.data.encoding import Encoder

    for name in ("block", *(("max_source", "max_target") if model.task == "seq2seq" else ())):
        longest = getattr(spec, name)
        if longest is not None and longest > model.context:
            raise DataError(Problem(("data", name), f"{longest}, but the model accepts at most {model.context} tokens"))
    splits: dict[str, Split | None] = {}
    content: list[object] = [_settings(spec), tokenizer_digest(tokenizer), vars(model)]
    for name in ("train", "eval", "test"):
        source, splits[name] = getattr(spec, name), None
        if source is not None:
            with located("data", name):
                splits[name], rows = Encoder(spec, model, tokenizer, f"data.{name}").split(source, spec.start(base))
            content.append({name: rows})
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return Data(**splits, spec=spec, digest=digest)


def with_targets(data: Data, file: Path, name: str) -> Data:
    """Return ``data`` with generated rows in place of ``data.train``. The digest stays that of the data as read.

    Args:
        data: data with training rows.
        file: JSON lines with ``source`` and ``target``, lists of token ids.
        name: what messages call the rows.

    Raises:
        DataError: a row that does not fit the model.
    """
    from compress.data.encoding import Encoder  # imports `datasets`, which takes a second

    assert data.train is not None
    rows = [json.loads(line) for line in file.read_bytes().splitlines()]
    label = f"targets {name}"
    with located(label):
        train = Encoder(data.spec, data.train.model, None, label).with_responses(rows)
    return replace(data, train=train)


def tokenizer_digest(tokenizer: Any | None) -> str:
    """Hash the definition of a tokenizer, without its current padding and truncation."""
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
