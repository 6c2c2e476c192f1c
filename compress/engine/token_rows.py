"""Rows of token ids, from the columns of a data set or the batches of a ``DataLoader``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from operator import index
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from compress.data.readers import TokenRow
from compress.errors import DataError
from compress.models.structure import IGNORE, Task

_COLUMNS = ("input_ids", "attention_mask", "labels")


def cell(row: Mapping[str, Any], column: str, at: int) -> Any:
    """Return the value of ``column`` in row ``at``. Raises DataError, with the row number, if there is none."""
    if column not in row:
        raise DataError(f"row {at} has no {column}, but row 0 has")
    return row[column]


def token_row(row: Mapping[str, Any], task: Task, at: int) -> TokenRow:
    """Return a row without padding. Labels of an encoder-decoder may have another length than ``input_ids``.

    Raises DataError if a value is not a list of whole numbers, or if lengths differ.
    """
    ids = _ints(cell(row, "input_ids", at), "input_ids", at)
    labels = _ints(row["labels"], "labels", at) if row.get("labels") is not None else None
    mask = [True] * len(ids)
    if row.get("attention_mask") is not None:
        mask = _ones_and_zeros(row["attention_mask"], at)
    if len(mask) != len(ids):
        raise DataError(f"row {at} has {len(ids)} input_ids and {len(mask)} values in attention_mask")
    if not any(mask):
        raise DataError(f"row {at} has no token; leave it out")
    if labels is not None and task == "seq2seq":
        labels = labels[: max((at + 1 for at, label in enumerate(labels) if label != IGNORE), default=0)]
    elif labels is not None and len(labels) == len(ids):
        labels = [label for label, real in zip(labels, mask, strict=True) if real]
    return TokenRow([token for token, real in zip(ids, mask, strict=True) if real], labels)


def unbatched(loader: DataLoader[Any], task: Task) -> Iterator[TokenRow]:
    """Yield the rows of the batches. Raises DataError for batches of another form."""
    count = 0
    for batch in loader:
        if not isinstance(batch, Mapping) or "input_ids" not in batch:
            raise DataError("the batches of a DataLoader must be mappings with input_ids (and labels)")
        columns = {key: batch[key] for key in _COLUMNS if key in batch}
        if len({len(column) for column in columns.values()}) > 1:
            raise DataError("a batch of the DataLoader has columns of different lengths")
        for at in range(len(batch["input_ids"])):
            yield token_row({key: column[at] for key, column in columns.items()}, task, count)
            count += 1


def _ones_and_zeros(values: Any, at: int) -> list[bool]:
    """Return a mask, given in any type of numbers or truth values. Raise DataError for other values."""
    found = values.tolist() if isinstance(values, Tensor) else values
    if isinstance(found, str | Mapping) or not isinstance(found, Iterable) or not all(each in (0, 1) for each in found):
        raise DataError(f"row {at}: attention_mask is not a list of 0 and 1")
    return [bool(each) for each in found]


def _ints(values: Any, column: str, at: int) -> list[int]:
    try:
        return [index(value) for value in (values.tolist() if isinstance(values, Tensor) else values)]
    except TypeError:
        raise DataError(f"row {at}: expected {column} to be a list of whole numbers") from None
