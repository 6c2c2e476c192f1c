"""Token-level contrast as a term: what a recipe's options reach, and what the memory bank remembers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from compress.functional.contrastive import token_contrastive, vocabulary_contrastive
from compress.objective import Objective
from compress.registry import TERMS

BEFORE = {
    "type": "token_contrastive", "weight": 1.0, "temperature": 0.1, "momentum": 0.5, "size": 8, "num_negatives": None,
    "positive_in_denominator": True, "exclude_duplicates": False,
}  # fmt: skip


def term_of(**options: Any) -> Any:
    return TERMS.read({"type": "token_contrastive", "size": 8, **options})


def states_of(model: Any, batch: Any) -> torch.Tensor:
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    with torch.no_grad():
        found: torch.Tensor = (model.model if model.config.is_encoder_decoder else model.transformer)(**inputs)[0]
    return found


@pytest.mark.parametrize("family", ["tiny_gpt2", "tiny_bart"])
@pytest.mark.parametrize("negatives", ["teacher", "student", "vocabulary"])
def test_negatives_are_those_asked_for(negatives: str, family: str, request: Any, side: Any, batch: Any) -> None:
    make = request.getfixturevalue(family)
    student, teacher = make(seed=0), make(seed=1)
    objective = Objective(side(student), [term_of(negatives=negatives, num_negatives=3)], teacher=side(teacher))
    rows = batch(student)
    objective.train()(rows)
    part: Any = objective.parts["0"]
    assert part.bank.any()
    objective.eval()
    states = part.student(states_of(student, rows)), part.teacher(states_of(teacher, rows))
    seq2seq = "decoder_input_ids" in rows
    tokens, mask = (rows[f"decoder_{name}" if seq2seq else name] for name in ("input_ids", "attention_mask"))
    torch.manual_seed(0)
    if negatives == "vocabulary":
        losses = vocabulary_contrastive(*states, mask, bank=part.bank, tokens=tokens, num_negatives=3, momentum=0.5)
    else:
        losses = token_contrastive(
            *states, mask, bank=part.bank[tokens], num_negatives=3, momentum=0.5, negatives=negatives  # type: ignore[arg-type]
        )  # fmt: skip
    torch.manual_seed(0)
    torch.testing.assert_close(objective(rows)[1]["token_contrastive"], losses.sum() / mask.sum())


def test_settings_say_nothing_of_what_is_as_it_always_was() -> None:
    """What was made before the options came keeps its key."""
    assert term_of().model_dump(mode="json") == BEFORE
    told = term_of(negatives="student").model_dump(mode="json")
    assert told == {**BEFORE, "negatives": "student"}
    assert TERMS.read(told) == term_of(negatives="student")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"negatives": "vocabulary"}, "needs num_negatives and a momentum above 0"),
        ({"negatives": "vocabulary", "num_negatives": 4, "momentum": 0}, "needs num_negatives and a momentum above 0"),
        (
            {"negatives": "vocabulary", "num_negatives": 4, "exclude_duplicates": True},
            "exclude_duplicates does nothing",
        ),
        ({"negatives": "batch"}, "'teacher', 'student' or 'vocabulary'"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        term_of(**options)
