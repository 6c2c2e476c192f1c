"""Laws for attention-relation distillation, against the formula written out for one head and one query row."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.functional.relation import attention_relation

law = settings(max_examples=30, deadline=None, derandomize=True)


def one_row(student: Tensor, teacher: Tensor, row: int, columns: list[int]) -> Tensor:
    """KL of one row of one head: X [T, d_r] of both sides, over the visible columns."""
    log_p, log_q = ((x[columns] @ x[row] / math.sqrt(x.shape[-1])).log_softmax(-1) for x in (teacher, student))
    return (log_p.exp() * (log_p - log_q)).sum()


@law
@given(seed=st.integers(0, 2**31), heads=st.sampled_from([1, 2]), causal=st.booleans(), length=st.integers(1, 5))
def test_is_the_formula_over_the_visible_columns(seed: int, heads: int, causal: bool, length: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(2, length, 4, generator=generator, dtype=torch.float64)
    teacher = torch.randn(2, length, 6, generator=generator, dtype=torch.float64)
    mask = torch.rand(2, length, generator=generator) < 0.7
    loss = attention_relation(student, teacher, heads=heads, causal=causal, mask=mask)
    assert loss.shape == (2, heads, length) and (loss >= -1e-12).all()
    for b in range(2):
        for head in range(heads):
            s = student[b].chunk(heads, -1)[head]
            t = teacher[b].chunk(heads, -1)[head]
            for row in range(length):
                columns = [c for c in range(length) if mask[b, c] and (c <= row or not causal)]
                expected = one_row(s, t, row, columns) if mask[b, row] else torch.tensor(0.0, dtype=torch.float64)
                torch.testing.assert_close(loss[b, head, row], expected)


@pytest.mark.parametrize("causal", [True, False])
def test_masked_rows_have_no_loss_no_gradient_and_no_say(causal: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    base, teacher = torch.randn(2, 2, 4, 6, generator=generator)
    mask = torch.tensor([[False, True, True, True], [False] * 4])
    results = []
    for padding in (0.0, math.nan):
        student = base.where(mask.unsqueeze(-1), padding).requires_grad_()
        loss = attention_relation(
            student, teacher.where(mask.unsqueeze(-1), padding), heads=3, causal=causal, mask=mask
        )
        results.append((loss, *torch.autograd.grad(loss.sum(), student)))
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)
    loss, gradient = results[0]
    assert (loss[1] == 0).all() and (loss[0, :, 0] == 0).all() and (gradient[~mask] == 0).all()
    assert loss[0].sum() > 0


def test_zero_at_agreement_and_constant_teacher() -> None:
    x = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    loss = attention_relation(x, x, heads=2, causal=True)
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    assert loss.abs().max() < 1e-6 and gradient.abs().max() < 1e-6


def test_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(1, 3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(1, 3, 6, generator=generator, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: attention_relation(s, teacher, heads=2, causal=True), student)


def test_shapes_that_do_not_fit_are_refused() -> None:
    x = torch.zeros(1, 3, 6)
    with pytest.raises(ValueError, match="does not divide"):
        attention_relation(x, torch.zeros(1, 3, 4), heads=3, causal=False)
    with pytest.raises(ValueError, match="share"):
        attention_relation(x, torch.zeros(1, 2, 6), heads=3, causal=False)
    with pytest.raises(ValueError, match="mask"):
        attention_relation(x, x, heads=3, causal=False, mask=torch.ones(1, 2))
