"""Token-level contrast as a term: what a recipe's options reach, and what the memory bank remembers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from compress.functional.contrastive import token_contrastive, vocabulary_contrastive
from compress.registry import TERMS
from compress.training.objective import Objective

BEFORE = {
    "type": "token_contrastive", "weight": 1.0, "temperature": 0.1, "momentum": 0.5, "size": 8, "num_negatives": None,
    "positive_in_denominator": True, "exclude_duplicates": False,
}  # fmt: skip


def term_of(**options: Any) -> Any:
    return TERMS.read({"type": "token_contrastive", "size": 8, **options})


def states_of(model: Any, batch: Any) -> torch.Tensor:
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    with torch.no_grad():
        found: torch.Tensor = model.base_model(**inputs)[0]
    return found


@pytest.mark.parametrize("family", ["tiny_gpt2", "tiny_bart", "tiny_mbart", "tiny_llama"])
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
    for option in ({"negatives": "student"}, {"bank": "position"}):
        written = term_of(**option).model_dump(mode="json")
        assert written == {**BEFORE, **option}
        assert TERMS.read(written) == term_of(**option)


def test_every_option_says_what_it_means() -> None:
    fields = type(term_of()).model_fields
    assert [name for name, field in fields.items() if not field.description] == ["type", "weight"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"negatives": "vocabulary"}, "needs num_negatives, a momentum above 0 and bank"),
        (
            {"negatives": "vocabulary", "num_negatives": 4, "momentum": 0},
            "needs num_negatives, a momentum above 0 and bank",
        ),
        (
            {"negatives": "vocabulary", "num_negatives": 4, "exclude_duplicates": True},
            "exclude_duplicates does nothing",
        ),
        ({"negatives": "vocabulary", "num_negatives": 4, "bank": "position"}, "above 0 and bank: vocabulary"),
        ({"bank": "position", "momentum": 0}, "bank: position does nothing without a momentum"),
        ({"negatives": "batch"}, "'teacher', 'student' or 'vocabulary'"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        term_of(**options)


@pytest.mark.parametrize("family", ["tiny_gpt2", "tiny_bart", "tiny_mbart", "tiny_llama"])
def test_a_bank_of_positions_remembers_each_row_by_itself(family: str, request: Any, side: Any, batch: Any) -> None:
    """Batches in turn, as accumulation sees them: a position's second loss is smoothed with its own first state."""
    make = request.getfixturevalue(family)
    student, teacher = make(seed=0), make(seed=1)
    objective = Objective(side(student), [term_of(bank="position", momentum=0.25)], teacher=side(teacher))
    objective.make_room(10, 12)
    part: Any = objective.parts["0"]
    assert objective.numbered and part.bank.shape == (10, 12, 8) and "parts.0.bank" in objective.state_dict()
    first = batch(student)
    seq2seq = "decoder_input_ids" in first
    name = "decoder_input_ids" if seq2seq else "input_ids"
    second = {**first, name: first[name].roll(1, 1), "rows": torch.tensor([2, 9, 4])}
    first["rows"] = torch.tensor([7, 0, 3])
    mask = first["decoder_attention_mask" if seq2seq else "attention_mask"].bool()
    expected = torch.zeros(10, 12, 8)
    student.eval()  # no dropout, but the term learns
    part.train()
    for rows in (first, second, first):
        inputs = {key: tensor for key, tensor in rows.items() if key != "rows"}
        ours, theirs = part.student(states_of(student, inputs)), part.teacher(states_of(teacher, inputs))
        kept = expected[rows["rows"], : mask.shape[1]]
        losses = token_contrastive(ours, theirs, mask, bank=kept, momentum=0.25)
        torch.testing.assert_close(objective(rows)[1]["token_contrastive"], losses.sum() / mask.sum())
        smooth = 0.25 * kept + 0.75 * ours
        for b, row in enumerate(rows["rows"].tolist()):
            expected[row, : mask.shape[1]][mask[b]] = smooth[b][mask[b]].detach()
        torch.testing.assert_close(part.bank, expected)
    objective.eval()(second)
    torch.testing.assert_close(part.bank, expected)


def test_a_bank_of_too_many_positions_is_refused() -> None:
    (problem,) = term_of(bank="position", size=128).room_problems(230_000, 512)
    assert str(problem).startswith(
        "size: 128; bank: position allows at most 9 for 230000 rows of up to 512 tokens in 4 GB"
    )
    for size, refused in ((64, 0), (65, 1)):  # 4 x 2^14 x 2^10 x 64 bytes are 4 GB
        assert len(list(term_of(bank="position", size=size).room_problems(2**14, 2**10))) == refused
