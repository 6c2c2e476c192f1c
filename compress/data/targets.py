"""Prompts or sources with answers that a model generated, as rows and batches to train on.

A prompt is what a causal model reads before the first token that is scored; a source is all that an encoder reads.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from compress.data.interface import ModelInterface
from compress.data.split import Batch, Split, collate
from compress.errors import DataError
from compress.models.structure import IGNORE, Task

if TYPE_CHECKING:
    from compress.data.dataset import Data


def prompt_of(input_ids: list[int], labels: list[int], task: Task) -> list[int]:
    """The prompt (or source) of a row with aligned labels; raises DataError where a causal row has no scored token."""
    if task == "seq2seq":
        return input_ids
    first = next((at for at, label in enumerate(labels) if label != IGNORE), None)
    if first is None:
        raise DataError("no token is scored, so nothing says where its prompt ends; leave the row out")
    return input_ids[: first + 1]


def prompts_of(split: Split) -> list[list[int]]:
    """The prompt (or source) of each row; raises DataError, with its number, for one that has none."""
    prompts = []
    for row, (ids, labels) in enumerate(zip(split.rows["input_ids"], split.rows["labels"], strict=True)):
        try:
            prompts.append(prompt_of(ids, labels, split.model.task))
        except DataError as error:
            raise DataError(f"{split.name}: row {row}: {error}") from None
    return prompts


def answered(prompt: list[int], answer: list[int], task: Task) -> dict[str, list[int]]:
    """A row with aligned labels, in which the answer alone is scored."""
    if task == "seq2seq":
        return {"input_ids": prompt, "labels": answer}
    return {"input_ids": (prompt + answer)[:-1], "labels": ([IGNORE] * len(prompt) + answer)[1:]}


def prompts_in(batch: Batch, task: Task) -> list[list[int]]:
    """The prompt (or source) of each row of a batch, without its padding."""
    rows = zip(
        batch["input_ids"].tolist(), batch["attention_mask"].sum(1).tolist(), batch["labels"].tolist(), strict=True
    )
    return [prompt_of(ids[:length], labels, task) for ids, length, labels in rows]


def answered_batch(prompts: Sequence[list[int]], answers: Sequence[list[int]], model: ModelInterface) -> Batch:
    """A batch of these prompts with these answers; nothing behind an answer is scored."""
    rows = zip(prompts, answers, strict=True)
    return collate([answered(prompt, answer, model.task) for prompt, answer in rows], model)


def with_targets(data: Data, file: Path, name: str) -> Data:
    """The data with the rows of ``file`` (JSON lines with ``source`` and ``target``, token ids) as ``data.train``.

    The digest stays that of the data as read. Raises DataError for a row that does not fit the model; ``name`` is what
    messages call the rows.
    """
    from compress.data.encoding import Encoder  # imports `datasets`, which takes a second

    assert data.train is not None
    rows = [json.loads(line) for line in file.read_bytes().splitlines()]
    train = Encoder(data.spec, data.train.model, None, f"targets {name}").answered(rows)
    return replace(data, train=train)
