"""Padding never changes a term: the same rows alone and in a padded batch give the same value and gradient."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.data import Batch, DataSpec, ModelInterface, Split, open_data
from compress.models.structure import IGNORE
from compress.registry import TERMS
from compress.surgery.masks import attach
from compress.training.objective import Objective

from .test_every_term import NAMES, term_of

LENGTHS = ((9, 2), (4, 7), (1, 1), (6, 5))
"""Tokens of source and target."""


@pytest.fixture
def rows() -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(3)

    def ids(size: int) -> list[int]:
        return torch.randint(3, 67, (size,), generator=generator).tolist()

    return [{"ids": ids(source), "labels": [*ids(target - 1), 2]} for source, target in LENGTHS]


@pytest.fixture
def split_of(tmp_path: Path) -> Callable[..., Split]:
    """Rows as a model reads them from a file."""

    def read(model: Any, rows: list[dict[str, list[int]]]) -> Split:
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        seq2seq = model.config.is_encoder_decoder
        source = {"json": "rows.jsonl", "input_ids": "ids"} | ({"labels": "labels"} if seq2seq else {})
        spec = DataSpec.model_validate({"train": source})
        split = open_data(spec, tokenizer=None, model=ModelInterface.of(model.config), base=tmp_path).train
        assert split is not None
        return split

    return read


@pytest.fixture
def objective_of(request: Any, side: Any) -> Callable[..., Objective]:
    """A term between two random models; whatever drops is off."""

    def make(name: str, family: str, **options: Any) -> Objective:
        factory = request.getfixturevalue(family)
        sizes = {"heads": 4, **({"decoder_heads": 2, "decoder_layers": 1} if family == "tiny_bart" else {})}
        student, teacher = factory(seed=0, **sizes), factory(seed=1, **sizes)
        term = term_of(name, **options)
        if term.needs_masks:
            attach(student, side(student).family, ["heads"])
        return Objective(side(student), [term], teacher=side(teacher)).eval()

    return make


def value_and_gradient(objective: Objective, batch: Batch) -> tuple[float, torch.Tensor]:
    objective.zero_grad()
    total, _ = objective(batch)
    total.backward()
    grads = [torch.zeros_like(each) if each.grad is None else each.grad for each in objective.parameters()]
    return float(total.detach()), torch.cat([grad.flatten().double() for grad in grads])


def assert_same(ours: tuple[float, torch.Tensor], theirs: tuple[float, torch.Tensor]) -> None:
    assert ours[0] == pytest.approx(theirs[0], rel=2e-5, abs=1e-7)
    assert theirs[1].isfinite().all() and theirs[1].norm() > 0
    assert (ours[1] - theirs[1]).norm() <= 1e-4 * theirs[1].norm()


@pytest.mark.parametrize("family", ["tiny_gpt2", "tiny_bart", "tiny_mbart", "tiny_llama"])
@pytest.mark.parametrize("name", NAMES)
def test_a_batch_is_the_mean_over_the_tokens_of_its_rows(
    name: str, family: str, rows: Any, split_of: Any, objective_of: Any
) -> None:
    objective = objective_of(name, family)
    split = split_of(objective.student, rows if family == "tiny_bart" else [row for row in rows if len(row["ids"]) > 1])
    (batch,) = split.loader(8)
    assert (batch["labels"] == IGNORE).any() and (batch["attention_mask"] == 0).any()
    alone = [(int((row["labels"] != IGNORE).sum()), *value_and_gradient(objective, row)) for row in split.loader(1)]
    tokens = sum(count for count, _, _ in alone)
    value = sum(count * value for count, value, _ in alone) / tokens
    gradient = torch.stack([count * gradient for count, _, gradient in alone]).sum(0) / tokens
    assert_same(value_and_gradient(objective, batch), (value, gradient))


@pytest.mark.parametrize("name", NAMES)
def test_padding_of_labels_is_no_target(name: str, rows: Any, split_of: Any, objective_of: Any) -> None:
    """Ready rows that were padded with -100, one of them all the way, count as they would without."""
    objective = objective_of(name, "tiny_bart")
    expected = value_and_gradient(objective, next(iter(split_of(objective.student, rows).loader(8))))
    padded = [{**row, "labels": row["labels"] + [IGNORE] * (12 - len(row["labels"]))} for row in rows]
    padded.insert(2, {"ids": [5, 6, 7], "labels": [IGNORE] * 12})
    assert_same(value_and_gradient(objective, next(iter(split_of(objective.student, padded).loader(8)))), expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_share_without_a_target_is_finite(name: str, rows: Any, split_of: Any, objective_of: Any) -> None:
    """A process may get rows of a batch whose targets are all padding; they weigh nothing, and 0 x NaN is NaN."""
    objective = objective_of(name, "tiny_bart")
    padded = {"ids": [5, 6, 7], "labels": [IGNORE] * 4}
    (batch,) = split_of(objective.student, [padded, rows[0], padded]).loader(3)
    value, gradient = value_and_gradient(objective, {name: tensor[2:] for name, tensor in batch.items()})
    assert (value == 0 and not gradient.any()) or TERMS.read(term_of(name)).needs_masks
    assert torch.tensor(value).isfinite() and gradient.isfinite().all()


@pytest.mark.parametrize("bank", ["vocabulary", "position"])
def test_a_memory_bank_sees_no_padding(bank: str, rows: Any, split_of: Any, objective_of: Any) -> None:
    padded = [{**row, "labels": row["labels"] + [IGNORE] * 5} for row in rows]
    banks = []
    for given in (rows, padded):
        torch.manual_seed(0)
        objective = objective_of("token_contrastive", "tiny_bart", bank=bank)
        split = split_of(objective.student, given)
        objective.make_room(len(split), split.longest_target)
        objective.parts.train()
        for batch in split.loader(4, numbered=objective.numbered):
            objective(batch)
        banks.append(objective.parts["0"].bank)
    torch.testing.assert_close(*banks)
    assert banks[0].any()
