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


_WINDOW = 32  # batches whose rows are sorted by length together: little padding, and still many different batches


@dataclass(frozen=True)
class Example:
    """What a generation starts from, as tokens and as text, and the texts it is compared with."""

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
    """A row's prompt or source with its references; empty for running text and ready tokens."""
    text: str | None = None
    """The running text, where the rows are blocks of one."""
    lines: int = 0
    truncated: int = 0
    """Rows that ``block``, ``max_source`` or ``max_target`` cut."""
    blank: int = 0
    """Rows with a source or prompt, or a target or response, without a word; of ready tokens, without a scored one."""
    tokens: int = 0
    """Scored positions."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self.rows[index]  # type: ignore[no-any-return]

    @property
    def cutting(self) -> str:
        """The setting that makes rows shorter."""
        return "data.max_source and data.max_target" if self.model.task == "seq2seq" else "data.block"

    @property
    def longest(self) -> int:
        """Most positions of a row that are read or predicted."""
        return max(len(row) for column in ("input_ids", "labels") for row in self.rows[column])

    @property
    def longest_target(self) -> int:
        """Most positions of a row that predict: those of a decoder, or of a causal model all."""
        return max(map(len, self.rows["labels"]))

    @property
    def words(self) -> int | None:
        """Words and line ends of running text (what a per-word perplexity is over), or None."""
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
        """Return batches ``start`` to ``steps`` of an endless chain of epochs; without ``steps``, those of the first.

        Which rows a batch holds is a pure function of (seed, number of the batch), so that a run resumed at ``start``
        sees what it would have seen. ``shuffle`` draws rows of like length together and drops the last short batch of
        an epoch (unless it is the only one); without it rows keep the file's order and all are seen. ``numbered`` adds
        ``rows`` [B], the number of each row in the split.
        """
        lengths = np.asarray(self.rows.with_format("numpy")["length"])
        order = Order(lengths, batch_size, seed, shuffle)
        return DataLoader(
            range(len(self)),  # type: ignore[arg-type]
            batch_sampler=BatchRange(order, start, order.per_epoch if steps is None else steps),
            collate_fn=partial(self._batch, numbered=numbered),
            generator=torch.Generator().manual_seed(seed),  # or a loader draws from the random state of training
        )

    def _batch(self, numbers: list[int], *, numbered: bool) -> Batch:
        try:
            batch = collate([self[number] for number in numbers], self.model)
        except DataError as error:
            raise DataError(f"{self.name}: {error}") from None
        return batch | ({"rows": torch.tensor(numbers)} if numbered else {})


@dataclass(frozen=True, eq=False)
class Order:
    """Which rows make up batch n of an epoch."""

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
        """Return the rows of each batch of an epoch; the shuffle depends on the seed and the number alone."""
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
    """Batches ``start`` to ``stop`` of the endless chain of epochs."""

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
    """Pad rows on the right to the longest: tokens with ``pad``, labels with -100, masks with 0.

    A decoder's inputs are the labels shifted right behind ``decoder_start``, with ``pad`` where a label is -100.
    Raises :class:`DataError` where no position is scored.
    """
    inputs, labels = [row["input_ids"] for row in rows], [row["labels"] for row in rows]
    if all(label == IGNORE for row in labels for label in row):
        raise DataError("a batch in which no token is scored; its labels are all -100")
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
