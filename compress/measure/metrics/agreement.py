"""Agreement of a model with a reference model.

Shapes: N scored positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from compress.errors import RecipeError
from compress.measure.metrics.metric import Figure, Metric
from compress.problem import Problem

if TYPE_CHECKING:
    from compress.data import Batch, Split
    from compress.generation.subject import Subject
    from compress.training.progress import Advance


def agreement(
    subject: Subject, split: Split, batch_size: int, advance: Advance = lambda rows: None, *, reference: Subject
) -> dict[str, float]:
    """Percentage of scored tokens at which model and ``reference`` have the same most probable token.

    ``kl`` is the mean KL(reference || model) over these tokens, in nats.
    """
    from compress.functional.divergence import forward_kl  # imports torch, which a report does not need
    from compress.models.structure import IGNORE

    same, divergence, tokens = 0, 0.0, 0
    for batch in split.loader(batch_size):
        for row in _rows(batch):
            scored = row["labels"] != IGNORE
            mine_NV, theirs_NV = subject.logits(row)[scored], reference.logits(row)[scored]
            if mine_NV.shape != theirs_NV.shape:
                text = f"has a vocabulary of {theirs_NV.shape[-1]}, but the model has one of {mine_NV.shape[-1]}"
                raise RecipeError(Problem(("reference",), text))
            same += int((mine_NV.argmax(-1) == theirs_NV.argmax(-1)).sum())
            divergence += float(forward_kl(mine_NV, theirs_NV).double().sum())
            tokens += int(scored.sum())
        advance(len(batch["input_ids"]))
    return {"agreement": 100 * same / tokens, "kl": divergence / tokens}


def _rows(batch: Batch) -> Iterator[Batch]:
    """Yield one row at a time, so that the logits of two models need little memory."""
    for at in range(len(batch["input_ids"])):
        yield {name: tensor[at : at + 1] for name, tensor in batch.items()}


AGREEMENT = Metric(
    agreement,
    {"agreement": Figure(better="higher", order=60), "kl": Figure(better="lower", order=61)},
    reads="logits",
    takes=("reference",),
)
