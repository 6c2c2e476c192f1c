"""Token rows and the batches made of them.

Shapes: B batch, S source positions, T target positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from compress.data.interface import ModelInterface
from compress.errors import DataError
from compress.models.structure import IGNORE

if TYPE_CHECKING:
    from datasets import Dataset

Batch = dict[str, Tensor]
"""LongTensors. Causal: ``input_ids``, ``attention_mask``, ``labels`` [B, T]. Sequence to sequence: ``input_ids``,
``attention_mask`` [B, S], ``decoder_input_ids``, ``decoder_attention_mask``, ``labels`` [B, T]. ``labels[b, t]`` is the
token that position t must predict (already aligned); -100 is not scored. Padding is on the right."""


_WINDOW = 32  # batches that are sorted by length together: little padding, and batches still vary


@dataclass(frozen=True)
class Example:
    """The input of a generation, as tokens and as text, and its reference texts."""

    input_ids: list[int]
    text: str
    references: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Split:
    """Rows with ``input_ids`` and aligned ``labels``, ready for a model."""

    name: str
    """Where the rows come from, such as ``data.train``."""
    rows: Dataset
    model: ModelInterface
    examples: tuple[Example, ...] = ()
    """Prompt or source of each row with its references; empty for running text and token rows."""
    text: str | None = None
    """The running text, if the rows are blocks of it."""
    lines: int = 0
    truncated: int = 0
    """Rows that ``block``, ``max_source`` or ``max_target`` cut."""
    blank: int = 0
    """Rows with an empty input or response. Of token rows: rows without a scored token."""
    tokens: int = 0
    """Scored positions."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self.rows[index]  # type: ignore[no-any-return]

    @property
    def cutting(self) -> str:
        """The settings that shorten rows."""
        return "data.max_source and data.max_target" if self.model.task == "seq2seq" else "data.block"

    @property
    def longest(self) -> int:
        """The largest number of positions of a row."""
        return max(len(row) for column in ("input_ids", "labels") for row in self.rows[column])

    @property
    def longest_target(self) -> int:
        """The largest number of predicted positions of a row: decoder positions, or all of a causal model."""
        return max(map(len, self.rows["labels"]))

    @property
    def words(self) -> int | None:
        """Words and line ends of running text, the unit of per-word perplexity; None for other rows."""
        return None if self.text is None else len(self.text.split()) + self.lines

    def loader(
        self,
        batch_size: int,
        *,
        seed: int = 0,
        start: int = 0,
        steps: int | None = None,
        shuffle: bool = False,
        numbered: bool = False,
    ) -> DataLoader[int]:
        """Return batches ``start`` to ``steps`` of an endless sequence of epochs. Without ``steps``, one epoch.

        The rows of a batch depend only on the seed and the number of the batch, so a run resumed at ``start`` sees the
        same batches. ``shuffle`` groups rows of similar length and drops the last short batch of an epoch, unless it is
        the only one. Without it, all rows come in file order. ``numbered`` adds ``rows`` [B], the number of each row.
        """
        lengths = np.asarray(self.rows.with_format("numpy")["length"])
        order = Order(lengths, batch_size, seed, shuffle)
        return DataLoader(
            range(len(self)),  # type: ignore[arg-type]
            batch_sampler=BatchRange(order, start, order.per_epoch if steps is None else steps),
            collate_fn=partial(self._batch, numbered=numbered),
            generator=torch.Generator().manual_seed(seed),  # a loader without one draws from the global random state
        )

    def _batch(self, numbers: list[int], *, numbered: bool) -> Batch:
        try:
            batch = collate([self[number] for number in numbers], self.model)
        except DataError as error:
            raise DataError(f"{self.name}: {error.problem.text}") from None
        return batch | ({"rows": torch.tensor(numbers)} if numbered else {})


@dataclass(frozen=True, eq=False)
class Order:
    """Assigns rows to the batches of an epoch."""

    lengths: np.ndarray[Any, np.dtype[np.int64]]
    batch_size: int
    seed: int
    shuffle: bool

    @property
    def per_epoch(self) -> int:
        """Batches in an epoch."""
        full, rest = divmod(len(self.lengths), self.batch_size)
        return max(full, 1) if self.shuffle else full + bool(rest)

    def epoch(self, number: int) -> list[list[int]]:
        """Return the rows of each batch of an epoch. The shuffle depends only on the seed and the epoch number."""
        if not self.shuffle:
            return self._chunks(np.arange(len(self.lengths)))
        random = np.random.default_rng([self.seed, number])
        kept = random.permutation(len(self.lengths))[: self.per_epoch * self.batch_size]
        window = self.batch_size * _WINDOW
        parts = [kept[at : at + window] for at in range(0, len(kept), window)]
        batches = self._chunks(np.concatenate([part[np.argsort(self.lengths[part], kind="stable")] for part in parts]))
        return [batches[at] for at in random.permutation(len(batches))]

    def _chunks(self, rows: np.ndarray[Any, np.dtype[np.int64]]) -> list[list[int]]:
        return [rows[at : at + self.batch_size].tolist() for at in range(0, len(rows), self.batch_size)]


class BatchRange(Sampler[list[int]]):
    """Batches ``start`` to ``stop`` of the endless sequence of epochs."""

    def __init__(self, order: Order, start: int, stop: int) -> None:
        self.order, self.start, self.stop = order, start, stop
        self.batch_size, self.drop_last = order.batch_size, order.shuffle  # Accelerate reads both

    def __len__(self) -> int:
        return max(self.stop - self.start, 0)

    def __iter__(self) -> Iterator[list[int]]:
        at = self.start
        while at < self.stop:
            number, first = divmod(at, self.order.per_epoch)
            batches = self.order.epoch(number)[first : first + self.stop - at]
            yield from batches
            at += len(batches)


def collate(rows: Sequence[dict[str, list[int]]], model: ModelInterface) -> Batch:
    """Pad rows on the right to the longest row: tokens with ``pad``, labels with -100, masks with 0.

    Decoder inputs are ``decoder_start`` and the labels shifted right, with ``pad`` in place of -100.
    Raises :class:`DataError` if no position is scored.
    """
    inputs, labels = [row["input_ids"] for row in rows], [row["labels"] for row in rows]
    if all(label == IGNORE for row in labels for label in row):
        raise DataError("no token of a batch is scored, because all its labels are -100")
    batch = {
        "input_ids": _padded(inputs, model.pad),
        "attention_mask": _padded([[1] * len(row) for row in inputs], 0),
        "labels": _padded(labels, IGNORE),
    }
    if model.task == "seq2seq":
        start = model.pad if model.decoder_start is None else model.decoder_start
        shifted = [[start, *(model.pad if token == IGNORE else token for token in row[:-1])] for row in labels]
        batch["decoder_input_ids"] = _padded(shifted, model.pad)
        batch["decoder_attention_mask"] = _padded([[1] * len(row) for row in labels], 0)
    return batch


def _padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], dtype=torch.long)
