"""Convert a caller's data into rows for one model: texts, pairs, a ``datasets.Dataset`` or a ``DataLoader``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from compress.data import DataSpec, ModelInterface, Source, Split
from compress.data.readers import TextPair, TokenRow
from compress.engine.token_rows import cell, token_row, unbatched
from compress.errors import DataError, ModelError, located
from compress.models.structure import Task
from compress.problem import Problem

_PAIRS = (("prompt", "response"), ("source", "target"))
ALLOWED = (
    "a list of texts, a list of (source, target) pairs, a datasets.Dataset (or a list of dicts) with the columns text, "
    "prompt and response, source and target, or input_ids and labels, or a DataLoader"
)


def as_split(data: Any, config: Any, tokenizer: Any = None, *, name: str = "data", block: int | None = None) -> Split:
    """Return the data as rows for a model with this transformers config.

    Texts are joined by line breaks and read as one stream in blocks of ``block`` tokens (by default the model's
    context). Rows of ``input_ids`` and batches of a ``DataLoader`` have labels in the form that transformers accepts:
    not shifted, and -100 for tokens that are not scored. ``attention_mask`` marks padding.

    Raises:
        DataError: the data is of another kind, has no rows or does not fit the model. The message starts with ``name``.
        ModelError: the tokenizer has more tokens than the model's vocabulary.
    """
    require_tokenizer(tokenizer, config)
    if block is not None and (type(block) is not int or block < 2):
        text = f"expected a whole number from 2, or None, got {block!r}"
        raise DataError(Problem(("block",), text))
    interface = ModelInterface.of(config, tokenizer)
    if block is not None and block > interface.context:
        raise DataError(Problem(("block",), f"{block} is more than the model's context of {interface.context}"))
    with located(name):
        if isinstance(data, Split):
            _require_same_reader(data, interface)
            return data
        rows = _listed(data, interface.task)
    if tokenizer is None and _holds_text(rows[0]):
        raise DataError(Problem(("tokenizer",), f"is missing, but {name} has texts; give the tokenizer of the model"))
    from compress.data.encoding import Encoder  # imports `datasets`, which takes a second

    encoder = Encoder(DataSpec(train=Source(text=(name,)), block=block), interface, tokenizer, name)
    with located(name):
        return _from_rows(rows, encoder)


def require_block_read(split: Split, data: Any, name: str = "data") -> None:
    """Raise DataError if a block is given for rows that it does not cut: token rows, pairs, and finished rows."""
    cut = split.text is not None or (split.model.task == "causal" and split.examples)
    if split is data or not cut:
        text = "would change nothing, because it cuts only running text and prompts with responses"
        raise DataError(Problem(("block",), f"{text}, and {name} has neither; leave it out"))


def require_tokenizer(tokenizer: Any, config: Any) -> None:
    """Raise ModelError for a tokenizer that produces token ids outside the vocabulary of the model."""
    if tokenizer is None:
        return
    if not callable(tokenizer) or not hasattr(tokenizer, "get_vocab"):
        raise ModelError(f"tokenizer: expected a transformers tokenizer, got {type(tokenizer).__name__}")
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= config.vocab_size:
        raise ModelError(
            f"tokenizer: produces token ids up to {highest}, but the model's vocabulary has {config.vocab_size} "
            "tokens; give the tokenizer of the model"
        )


def _require_same_reader(split: Split, interface: ModelInterface) -> None:
    """Raise DataError for rows that were made for a model with another task, vocabulary or context length."""
    made = split.model
    if made.task != interface.task:
        raise DataError(f"contains rows for a {made.task} model, but this is a {interface.task} model")
    if made.vocabulary > interface.vocabulary:
        raise DataError(
            f"contains rows for a vocabulary of {made.vocabulary} tokens, but the model has {interface.vocabulary}"
        )
    if made.context > interface.context and split.longest > interface.context:
        raise DataError(f"has rows of {split.longest} tokens, but the model accepts at most {interface.context}")


def _listed(data: Any, task: Task) -> list[Any]:
    """Return the rows. Raise DataError unless all are of the same kind as the first."""
    if isinstance(data, DataLoader):
        rows = list(unbatched(data, task))
    elif isinstance(data, str | bytes | Mapping | Tensor) or not isinstance(data, Iterable):
        raise DataError(f"{type(data).__name__} is not supported; allowed: {ALLOWED}")
    else:
        rows = list(data)
    if not rows:
        raise DataError("has no rows")
    kinds = [_kind(row) for row in rows]
    if kinds[0] is None:
        raise DataError(f"row 0 has type {type(rows[0]).__name__}; allowed: {ALLOWED}")
    if other := next((at for at, kind in enumerate(kinds) if kind != kinds[0]), None):
        raise DataError(f"row {other} has type {type(rows[other]).__name__}, but row 0 has type {kinds[0]}")
    return rows


def _holds_text(row: Any) -> bool:
    """Return whether a row needs a tokenizer."""
    columns = set(row) if isinstance(row, Mapping) else set()
    pair = any({given, expected} <= columns for given, expected in _PAIRS)
    return _kind(row) in ("text", "pair") or pair or ("text" in columns and "input_ids" not in columns)


def _from_rows(rows: list[Any], encoder: Any) -> Split:
    kind = _kind(rows[0])
    if kind == "mapping":
        return _from_columns(rows, encoder)
    if kind == "text":
        return _from_texts(rows, encoder)
    if kind == "pair":
        return _from_pairs([(source, target, at) for at, (source, target) in enumerate(rows)], encoder)
    split: Split = encoder.tokens(rows)
    return split


def _kind(row: Any) -> str | None:
    if isinstance(row, TokenRow):
        return "tokens"
    if isinstance(row, Mapping):
        return "mapping"
    if isinstance(row, str):
        return "text"
    return "pair" if isinstance(row, Sequence) and not isinstance(row, bytes) and len(row) == 2 else None


def _from_texts(texts: list[str], encoder: Any) -> Split:
    if encoder.model.task == "seq2seq":
        raise DataError("running text does not fit a seq2seq model; give (source, target) pairs")
    split: Split = encoder.text("\n".join(texts))
    return split


def _from_pairs(rows: Iterable[tuple[Any, Any, int]], encoder: Any) -> Split:
    pairs = [TextPair(_text(source, at), _several(target, at)) for source, target, at in rows]
    split: Split = encoder.pairs(pairs) if encoder.model.task == "seq2seq" else encoder.prompts(pairs)
    return split


def _from_columns(rows: list[Mapping[str, Any]], encoder: Any) -> Split:
    columns = set(rows[0])
    for given, expected in _PAIRS:
        if {given, expected} <= columns:
            named = ((cell(row, given, at), cell(row, expected, at), at) for at, row in enumerate(rows))
            return _from_pairs(named, encoder)
    if "input_ids" in columns:
        split: Split = encoder.tokens([token_row(row, encoder.model.task, at) for at, row in enumerate(rows)])
        return split
    if "text" in columns:
        texts = [_text(cell(row, "text", at), at) for at, row in enumerate(rows)]
        return _from_texts(texts, encoder)
    raise DataError(f"has the columns {', '.join(sorted(map(str, columns)))}; allowed: {ALLOWED}")


def _text(value: Any, at: int) -> str:
    if not isinstance(value, str):
        raise DataError(f"row {at}: expected a string, got {type(value).__name__}")
    return value


def _several(target: Any, at: int) -> tuple[str, ...]:
    """Return the references of a row, which contains one text or several."""
    texts = (target,) if not isinstance(target, list | tuple) else tuple(target)
    if not texts:
        raise DataError(f"row {at} has an empty list of targets; give at least one text")
    return tuple(_text(text, at) for text in texts)
