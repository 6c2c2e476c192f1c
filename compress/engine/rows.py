"""Data that callers hand in, as rows for one model: texts, pairs, a ``datasets.Dataset``, a ``DataLoader``."""

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
    """Rows for a model with this stock config.

    Texts are joined by line breaks and read as one stream in blocks of ``block`` tokens (by default the model's
    context). Rows of ``input_ids`` and batches of a ``DataLoader`` carry labels as transformers takes them: not
    shifted, -100 where nothing is scored, padding left out by ``attention_mask``.

    Raises:
        DataError: data of another kind, without rows, or that does not fit the model; ``name`` is the argument.
        ModelError: a tokenizer with more tokens than the model's vocabulary.
    """
    require_tokenizer(tokenizer, config)
    if block is not None and (type(block) is not int or block < 2):
        text = f"{block!r} is not a number of tokens; allowed: whole numbers from 2, or None"
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
        raise DataError(Problem(("tokenizer",), f"is missing, and {name} holds texts; give the tokenizer of the model"))
    from compress.data.encoding import Encoder  # imports `datasets`, which takes a second

    encoder = Encoder(DataSpec(train=Source(text=(name,)), block=block), interface, tokenizer, name)
    with located(name):
        return _from_rows(rows, encoder)


def require_block_read(split: Split, data: Any, name: str = "data") -> None:
    """Refuse a block for rows that none is cut from: rows of tokens, sources and targets, and rows made before."""
    cut = split.text is not None or (split.model.task == "causal" and split.examples)
    if split is data or not cut:
        text = "would change nothing, it cuts running text and prompts with responses"
        raise DataError(Problem(("block",), f"{text}, and {name} has neither; leave it out"))


def require_tokenizer(tokenizer: Any, config: Any) -> None:
    """Refuse a tokenizer that produces token ids outside the vocabulary of the model."""
    if tokenizer is None:
        return
    if not callable(tokenizer) or not hasattr(tokenizer, "get_vocab"):
        raise ModelError(f"tokenizer: a {type(tokenizer).__name__} is not a transformers tokenizer")
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= config.vocab_size:
        raise ModelError(
            f"tokenizer: produces token ids up to {highest}, but the model's vocabulary has {config.vocab_size} "
            "tokens; give the tokenizer of the model"
        )


def _require_same_reader(split: Split, interface: ModelInterface) -> None:
    """Refuse rows that were made for a model of another task, vocabulary or context."""
    made = split.model
    if made.task != interface.task:
        raise DataError(f"holds rows of a {made.task} model, and this is a {interface.task} model")
    if made.vocabulary > interface.vocabulary:
        raise DataError(
            f"holds rows over {made.vocabulary} tokens, and the model's vocabulary has {interface.vocabulary}"
        )
    if made.context > interface.context and split.longest > interface.context:
        raise DataError(f"has rows of {split.longest} tokens, and the model takes {interface.context}")


def _listed(data: Any, task: Task) -> list[Any]:
    """The rows, all of one kind: that of the first."""
    if isinstance(data, DataLoader):
        rows = list(unbatched(data, task))
    elif isinstance(data, str | bytes | Mapping | Tensor) or not isinstance(data, Iterable):
        raise DataError(f"a {type(data).__name__} is not data to read; allowed: {ALLOWED}")
    else:
        rows = list(data)
    if not rows:
        raise DataError("has no rows")
    kinds = [_kind(row) for row in rows]
    if kinds[0] is None:
        raise DataError(f"row 0 is a {type(rows[0]).__name__}; allowed: {ALLOWED}")
    if other := next((at for at, kind in enumerate(kinds) if kind != kinds[0]), None):
        raise DataError(f"row {other} is a {type(rows[other]).__name__}, and row 0 is a {kinds[0]}")
    return rows


def _holds_text(row: Any) -> bool:
    """Whether a row needs a tokenizer."""
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
        raise DataError(f"row {at} holds a {type(value).__name__} where a text belongs")
    return value


def _several(target: Any, at: int) -> tuple[str, ...]:
    """The references of a row: a text, or several."""
    texts = (target,) if not isinstance(target, list | tuple) else tuple(target)
    if not texts:
        raise DataError(f"row {at} has an empty list of targets; give one text at least")
    return tuple(_text(text, at) for text in texts)
