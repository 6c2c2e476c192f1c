"""Every registered term on both families: finite, 0 for the teacher itself, weighted, and felt by the student."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from compress.registry import TERMS
from compress.surgery.masks import attach, masks_of
from compress.training.objective import Objective

NAMES = list(TERMS.builtin)
OPTIONS = {"attention_relation": {"heads": 2}, "token_contrastive": {"size": 8}}
DISTANCES = sorted(set(NAMES) - {"cross_entropy", "mask_l1", "token_contrastive"})


def term_of(name: str, **options: Any) -> Any:
    return TERMS.read({"type": name, **OPTIONS.get(name, {}), **options})


@pytest.mark.parametrize("family", ["tiny_gpt2", "tiny_bart", "tiny_mbart", "tiny_llama"])
@pytest.mark.parametrize("name", NAMES)
def test_finite_weighted_and_felt(name: str, family: str, request: Any, side: Any, batch: Any) -> None:
    make = request.getfixturevalue(family)
    student, teacher, term = make(seed=0), make(seed=1), term_of(name, weight=2.0)
    ours = side(student)
    if term.needs_masks:
        attach(student, ours.family, ["heads", "ffn"])
    objective = Objective(ours, [term], teacher=side(teacher) if term.needs_teacher else None)
    total, values = objective(batch(student))
    assert list(values) == [name] and values[name].isfinite() and values[name] > 0
    torch.testing.assert_close(total, 2 * values[name])
    total.backward()
    felt = masks_of(student).values() if term.needs_masks else [student.get_input_embeddings().weight]
    for parameter in felt:
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any()
    for part in objective.parts.parameters():
        assert part.grad is not None and part.grad.any()
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize("family", ["tiny_gpt2", "tiny_bart", "tiny_mbart", "tiny_llama"])
@pytest.mark.parametrize("name", DISTANCES)
def test_the_teacher_itself_is_at_distance_zero(name: str, family: str, request: Any, side: Any, batch: Any) -> None:
    model = request.getfixturevalue(family)()
    teacher = copy.deepcopy(model)
    _, values = Objective(side(model), [term_of(name)], teacher=side(teacher))(batch(model))
    assert abs(values[name].item()) < 1e-5


@pytest.mark.parametrize("family", ["tiny_gpt2", "tiny_bart", "tiny_mbart", "tiny_llama"])
@pytest.mark.parametrize("name", NAMES)
def test_padding_is_not_seen(name: str, family: str, request: Any, side: Any, batch: Any) -> None:
    """What stands in masked positions of the decoder (or only stack) changes no term."""
    make = request.getfixturevalue(family)
    student, teacher, term = make(seed=0), make(seed=1), term_of(name)
    ours = side(student)
    if term.needs_masks:
        attach(student, ours.family, ["heads"])
    objective = Objective(ours, [term], teacher=side(teacher)).eval()
    one = batch(student)
    tokens, mask = (
        ("decoder_input_ids", "decoder_attention_mask")
        if "decoder_input_ids" in one
        else ("input_ids", "attention_mask")
    )
    assert (one[mask] == 0).any()
    other = {**one, tokens: torch.where(one[mask] == 0, 5, one[tokens])}
    torch.testing.assert_close(objective(one)[1][name], objective(other)[1][name], atol=1e-6, rtol=1e-5)


def test_a_repeated_type_keeps_both_values(tiny_gpt2: Any, side: Any, batch: Any) -> None:
    terms = [term_of("jensen_shannon", beta=beta) for beta in (0.1, 0.5)]
    student = tiny_gpt2(seed=0)
    _, values = Objective(side(student), terms, teacher=side(tiny_gpt2(seed=1)))(batch(student))
    assert list(values) == ["jensen_shannon.0", "jensen_shannon.1"] and len(set(values.values())) == 2
