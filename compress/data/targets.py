"""Prompts or sources with responses that a model generated, as rows and batches to train on.

A prompt is what a causal model reads before the first scored token. A source is everything that an encoder reads.
"""

from __future__ import annotations

from collections.abc import Sequence

from compress.data.interface import ModelInterface
from compress.data.split import Batch, Split, collate
from compress.errors import DataError
from compress.models.structure import IGNORE, Task


def prompt_of(input_ids: list[int], labels: list[int], task: Task) -> list[int]:
    """Return the prompt (or source) of a row with aligned labels. Raise DataError if a causal row scores no token."""
    if task == "seq2seq":
        return input_ids
    first = next((at for at, label in enumerate(labels) if label != IGNORE), None)
    if first is None:
        raise DataError("no token is scored, so the end of the prompt is unknown; remove the row")
    return input_ids[: first + 1]


def prompts_of(split: Split) -> list[list[int]]:
    """Return the prompt (or source) of each row. Raises DataError with the row number for a row that has none."""
    prompts = []
    for row, (ids, labels) in enumerate(zip(split.rows["input_ids"], split.rows["labels"], strict=True)):
        try:
            prompts.append(prompt_of(ids, labels, split.model.task))
        except DataError as error:
            raise DataError(f"row {row} of {split.name}: {error.problem.text}") from None
    return prompts


def response_row(prompt: list[int], response: list[int], task: Task) -> dict[str, list[int]]:
    """Return a row with aligned labels that scores the response only."""
    if task == "seq2seq":
        return {"input_ids": prompt, "labels": response}
    return {"input_ids": (prompt + response)[:-1], "labels": ([IGNORE] * len(prompt) + response)[1:]}


def prompts_in(batch: Batch, task: Task) -> list[list[int]]:
    """Return the prompt (or source) of each row of a batch, without its padding."""
    rows = zip(
        batch["input_ids"].tolist(), batch["attention_mask"].sum(1).tolist(), batch["labels"].tolist(), strict=True
    )
    return [prompt_of(ids[:length], labels, task) for ids, length, labels in rows]


def response_batch(prompts: Sequence[list[int]], responses: Sequence[list[int]], model: ModelInterface) -> Batch:
    """Return a batch of these prompts with these responses. Positions after the end of a response are not scored."""
    rows = zip(prompts, responses, strict=True)
    return collate([response_row(prompt, response, model.task) for prompt, response in rows], model)
