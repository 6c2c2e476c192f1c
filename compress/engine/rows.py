"""Data that callers hand in, as rows for one model: texts, pairs, a ``datasets.Dataset``, a ``DataLoader``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from compress.data import DataSpec, ModelInterface, Source, Split
from compress.data.readers import TextPair, TokenRow
from compress.errors import DataError, ModelError
from compress.models.structure import IGNORE, Task

_COLUMNS = ("input_ids", "attention_mask", "labels")
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
    if isinstance(data, Split):
        return data
    from compress.data.encoding import Encoder  # imports `datasets`, which takes a second

    require_tokenizer(tokenizer, config)
    if block is not None and (type(block) is not int or block < 2):
        raise DataError(f"block: {block!r} is not a number of tokens; allowed: whole numbers from 2, or None")
    spec = DataSpec(train=Source(text=(name,)), block=block)
    interface = ModelInterface.of(config, tokenizer)
    if block is not None and block > interface.context:
        raise DataError(f"block: {block} is more than the model's context of {interface.context}")
    encoder = Encoder(spec, interface, tokenizer, name)
    if isinstance(data, DataLoader):
        return encoder.tokens(_some(list(_unbatched(data, name, interface.task)), name))
    rows = _some(_listed(data, name), name)
    if isinstance(rows[0], Mapping):
        return _from_columns(rows, encoder, name)
    if tokenizer is None:
        raise DataError(f"tokenizer: is missing, but {name} contains texts; give the tokenizer of the model")
    if all(isinstance(row, str) for row in rows):
        return _from_texts(rows, encoder, name)
    if all(_is_pair(row) for row in rows):
        pairs = [TextPair(source, _several(target)) for source, target in rows]
        return encoder.pairs(pairs) if interface.task == "seq2seq" else encoder.prompts(pairs)
    raise DataError(f"{name}: row 0 is a {type(rows[0]).__name__}; allowed: {ALLOWED}")


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


def _listed(data: Any, name: str) -> list[Any]:
    if isinstance(data, str | bytes | Mapping) or not isinstance(data, Iterable):
        raise DataError(f"{name}: a {type(data).__name__} is not data to read; allowed: {ALLOWED}")
    return list(data)


def _some(rows: list[Any], name: str) -> list[Any]:
    if not rows:
        raise DataError(f"{name}: has no rows")
    return rows


def _is_pair(row: Any) -> bool:
    return isinstance(row, Sequence) and not isinstance(row, str) and len(row) == 2 and isinstance(row[0], str)


def _several(target: Any) -> tuple[str, ...]:
    return (target,) if isinstance(target, str) else tuple(target)


def _from_texts(texts: list[str], encoder: Any, name: str) -> Split:
    if encoder.model.task == "seq2seq":
        raise DataError(f"{name}: running text does not fit a seq2seq model; give (source, target) pairs")
    split: Split = encoder.text("\n".join(texts))
    return split


def _from_columns(rows: list[Mapping[str, Any]], encoder: Any, name: str) -> Split:
    columns = set(rows[0])
    for given, expected in _PAIRS:
        if {given, expected} <= columns:
            pairs = [TextPair(row[given], _several(row[expected])) for row in rows]
            split: Split = encoder.pairs(pairs) if encoder.model.task == "seq2seq" else encoder.prompts(pairs)
            return split
    if "input_ids" in columns:
        split = encoder.tokens([_token_row(row, encoder.model.task) for row in rows])
        return split
    if "text" in columns:
        return _from_texts([row["text"] for row in rows], encoder, name)
    raise DataError(f"{name}: has the columns {', '.join(sorted(columns))}; allowed: {ALLOWED}")


def _token_row(row: Mapping[str, Any], task: Task) -> TokenRow:
    """A row without padding; the labels of a decoder have a length of their own."""
    ids = _ints(row["input_ids"])
    labels = _ints(row["labels"]) if row.get("labels") is not None else None
    mask = _ints(row["attention_mask"]) if row.get("attention_mask") is not None else [1] * len(ids)
    if labels is not None and task == "seq2seq":
        labels = labels[: max((at + 1 for at, label in enumerate(labels) if label != IGNORE), default=0)]
    elif labels is not None and len(labels) == len(ids):
        labels = [label for label, real in zip(labels, mask, strict=True) if real]
    return TokenRow([token for token, real in zip(ids, mask, strict=True) if real], labels)


def _unbatched(loader: DataLoader[Any], name: str, task: Task) -> Iterator[TokenRow]:
    for batch in loader:
        if not isinstance(batch, Mapping) or "input_ids" not in batch:
            raise DataError(f"{name}: the batches of a DataLoader must be mappings with input_ids (and labels)")
        for at in range(len(batch["input_ids"])):
            yield _token_row({key: batch[key][at] for key in _COLUMNS if key in batch}, task)


def _ints(values: Any) -> list[int]:
    return values.tolist() if isinstance(values, Tensor) else [int(value) for value in values]
