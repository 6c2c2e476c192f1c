"""Laws and golden values for token-level contrastive distillation and its memory bank."""

import math
from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy

from compress.functional.contrastive import smoothed, token_contrastive, update_bank, vocabulary_contrastive

law = settings(max_examples=40, deadline=None, derandomize=True)

STUDENT = torch.tensor([[1, 0], [0, 2], [1, 1]], dtype=torch.float64)
TEACHER = torch.tensor([[1, 0.2], [0.1, 1], [1, -1]], dtype=torch.float64)
BANK = torch.tensor([[0.5, 0.5], [0, 1], [1, 0]], dtype=torch.float64)
REAL = torch.ones(3, dtype=torch.bool)


@st.composite
def sequences(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """Student and teacher states [B, T, D] and a mask [B, T], rows without any token included."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = draw(st.integers(1, 3)), draw(st.integers(1, 6)), draw(st.integers(1, 5))
    student = torch.randn(shape, generator=generator, dtype=torch.float64)
    teacher = student + draw(st.sampled_from([0.0, 0.5])) * torch.randn(shape, generator=generator, dtype=torch.float64)
    return student, teacher, torch.rand(shape[:-1], generator=generator) < draw(st.sampled_from([0.0, 0.6, 1.1]))


def plain_info_nce(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """InfoNCE over one sequence without padding, as a cross-entropy over cosine similarities."""
    cosine = cosine_similarity(student.unsqueeze(1), teacher.unsqueeze(0), dim=-1)
    return cross_entropy(cosine / temperature, torch.arange(len(student)), reduction="none")


@pytest.mark.parametrize(
    ("momentum", "positive_in_denominator", "expected"),
    [(0.0, True, 8.828316), (0.0, False, -1.956745), (0.5, True, 6.507778), (0.5, False, -6.420549)],
)
def test_golden(momentum: float, positive_in_denominator: bool, expected: float) -> None:
    loss = token_contrastive(
        STUDENT, TEACHER, REAL, bank=BANK, momentum=momentum, positive_in_denominator=positive_in_denominator
    )
    assert loss.sum().item() == pytest.approx(expected, abs=1e-6)


@law
@given(sequence=sequences(), temperature=st.sampled_from([0.05, 0.1, 1.0]))
def test_equals_plain_info_nce_over_the_real_tokens(
    sequence: tuple[Tensor, Tensor, Tensor], temperature: float
) -> None:
    student, teacher, mask = sequence
    loss = token_contrastive(student, teacher, mask, temperature=temperature, bank=torch.rand_like(student))
    for row in range(len(mask)):
        real = mask[row]
        expected = torch.zeros(len(real), dtype=torch.float64)
        if real.any():
            expected[real] = plain_info_nce(student[row][real], teacher[row][real], temperature)
        torch.testing.assert_close(loss[row], expected)


@law
@given(sequence=sequences(), scale=st.floats(0.1, 10.0))
def test_nonnegative_and_blind_to_length(sequence: tuple[Tensor, Tensor, Tensor], scale: float) -> None:
    student, teacher, mask = sequence
    loss = token_contrastive(student, teacher, mask)
    assert (loss >= -1e-12).all()
    torch.testing.assert_close(token_contrastive(scale * student, teacher / scale, mask), loss)


@pytest.mark.parametrize("negatives", ["teacher", "student"])
@pytest.mark.parametrize("positive_in_denominator", [True, False])
@law
@given(sequence=sequences())
def test_masked_tokens_have_no_part(
    negatives: str, positive_in_denominator: bool, sequence: tuple[Tensor, Tensor, Tensor]
) -> None:
    student, teacher, mask = sequence
    garbage = torch.full_like(student, math.nan)
    results = []
    for padding in (torch.zeros_like(student), garbage):
        s = student.where(mask.unsqueeze(-1), padding).requires_grad_()
        t = teacher.where(mask.unsqueeze(-1), padding).requires_grad_()
        loss = token_contrastive(
            s,
            t,
            mask,
            bank=student.flip(0).where(mask.unsqueeze(-1), padding),
            momentum=0.5,
            negatives=negatives,  # type: ignore[arg-type]
            positive_in_denominator=positive_in_denominator,
        )
        results.append((loss, *torch.autograd.grad(loss.sum(), (s, t))))
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)
        assert (clean[~mask] == 0).all()


@pytest.mark.parametrize("positive_in_denominator", [True, False])
@pytest.mark.parametrize("negatives", ["teacher", "student"])
def test_a_token_alone_costs_nothing(positive_in_denominator: bool, negatives: str) -> None:
    for tokens, mask in [(1, [True]), (3, [False, True, False])]:
        student = torch.randn(tokens, 4, requires_grad=True)
        loss = token_contrastive(
            student,
            torch.randn(tokens, 4),
            torch.tensor(mask),
            negatives=negatives,  # type: ignore[arg-type]
            positive_in_denominator=positive_in_denominator,
        )
        loss.sum().backward()
        assert torch.equal(loss, torch.zeros(tokens))
        assert student.grad is not None and torch.equal(student.grad, torch.zeros(tokens, 4))


def test_zero_states_have_cosine_zero_and_no_gradient() -> None:
    student = STUDENT.clone().index_fill(0, torch.tensor([1]), 0.0).requires_grad_()
    loss = token_contrastive(student, TEACHER, REAL)
    loss.sum().backward()
    assert loss[1].item() == pytest.approx(math.log(3))
    assert student.grad is not None and student.grad.isfinite().all() and (student.grad[1] == 0).all()


def test_gradient_reaches_student_and_teacher_but_not_the_bank() -> None:
    student, teacher, bank = (x.clone().requires_grad_() for x in (STUDENT, TEACHER, BANK))

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        return token_contrastive(student, teacher, REAL, bank=bank, momentum=0.5)

    assert torch.autograd.gradcheck(loss, (student, teacher))
    loss(student, teacher).sum().backward()
    assert student.grad is not None and student.grad.abs().sum() > 0
    assert bank.grad is None


def test_negatives_of_the_student() -> None:
    q, h, t = (x / x.norm(dim=-1, keepdim=True) for x in (0.5 * BANK + 0.5 * STUDENT, STUDENT, TEACHER))
    scores = q @ h.T / 0.1
    scores.diagonal().copy_((q * t).sum(-1) / 0.1)
    loss = token_contrastive(STUDENT, TEACHER, REAL, bank=BANK, momentum=0.5, negatives="student")
    torch.testing.assert_close(loss, cross_entropy(scores, torch.arange(3), reduction="none"))


def test_tokens_of_the_same_id_can_be_left_out() -> None:
    ids = torch.tensor([7, 5, 7])
    loss = token_contrastive(STUDENT, TEACHER, REAL, exclude_duplicates_of=ids)
    for anchor, others in [(0, [0, 1]), (1, [0, 1, 2]), (2, [1, 2])]:
        cosine = cosine_similarity(STUDENT[anchor], TEACHER[others], dim=-1) / 0.1
        assert loss[anchor].item() == pytest.approx(
            (cosine.logsumexp(0) - cosine[others.index(anchor)]).item(), abs=1e-9
        )


def test_sampled_negatives() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 1, 9, 4, generator=generator, dtype=torch.float64)
    mask = torch.arange(9) < 7
    mask = mask.unsqueeze(0)
    everything = token_contrastive(student, teacher, mask)
    assert torch.equal(token_contrastive(student, teacher, mask, num_negatives=6, generator=generator), everything)
    draws = [token_contrastive(student, teacher, mask, num_negatives=1, generator=generator) for _ in range(300)]
    assert all((draw <= everything + 1e-12).all() for draw in draws)
    cosine = cosine_similarity(student[0].unsqueeze(1), teacher[0].unsqueeze(0), dim=-1) / 0.1
    pairs = torch.logaddexp(cosine, cosine.diagonal().unsqueeze(-1)) - cosine.diagonal().unsqueeze(-1)
    for anchor in range(7):  # each other real token is drawn, and nothing else
        expected = {round(pairs[anchor, j].item(), 6) for j in range(7) if j != anchor}
        assert {round(draw[0, anchor].item(), 6) for draw in draws} == expected
    again = [
        token_contrastive(student, teacher, mask, num_negatives=3, generator=torch.Generator().manual_seed(5))
        for _ in range(2)
    ]
    assert torch.equal(*again)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"momentum": 1.0}, "momentum"),
        ({"momentum": 0.5}, "bank"),
        ({"momentum": 0.5, "bank": BANK[:1]}, "bank"),
        ({"num_negatives": 0}, "num_negatives"),
        ({"negatives": "batch"}, "negatives"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        token_contrastive(STUDENT, TEACHER, REAL, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mask"):
        token_contrastive(STUDENT, TEACHER, REAL[:1])


@st.composite
def vocabularies(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A sequence with its token ids, and a bank with rows never seen, whatever the ids are."""
    student, teacher, mask = draw(sequences())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rows = draw(st.integers(1, 8))
    bank = torch.randn(rows, student.shape[-1], generator=generator, dtype=torch.float64)
    bank[torch.rand(rows, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.1]))] = 0
    return student, teacher, mask, torch.randint(rows, mask.shape, generator=generator), bank


@pytest.mark.slow
@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("positive_in_denominator", [True, False])
@law
@given(case=vocabularies())
def test_negatives_of_the_vocabulary_are_the_rows_seen_but_the_own(
    positive_in_denominator: bool, momentum: float, case: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
) -> None:
    student, teacher, mask, tokens, bank = case
    student.requires_grad_(), bank.requires_grad_()
    loss = vocabulary_contrastive(
        student, teacher, mask, bank=bank, tokens=tokens, num_negatives=len(bank), momentum=momentum,
        positive_in_denominator=positive_in_denominator,
    )  # fmt: skip
    expected = torch.zeros_like(loss)
    for at in mask.nonzero().unbind():
        at = tuple(at.tolist())
        anchor = momentum * bank[tokens[at]].detach() + (1 - momentum) * student[at]
        positive = cosine_similarity(anchor, teacher[at], dim=-1) / 0.1
        others = [row for row in range(len(bank)) if bank[row].any() and row != tokens[at]]
        if others:
            scores = cosine_similarity(anchor.unsqueeze(0), bank[others].detach(), dim=-1) / 0.1
            counted = torch.cat([positive.unsqueeze(0), scores]) if positive_in_denominator else scores
            expected[at] = counted.logsumexp(0) - positive
    torch.testing.assert_close(loss, expected)
    ours, theirs = (torch.autograd.grad(x.sum() + 0 * student.sum(), student)[0] for x in (loss, expected))
    torch.testing.assert_close(ours, theirs)
    assert not loss.requires_grad or torch.autograd.grad(loss.sum(), bank, allow_unused=True) == (None,)


@pytest.mark.slow
def test_negatives_of_the_vocabulary_are_drawn_evenly_and_once_each() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 4, generator=generator, dtype=torch.float64).unsqueeze(1).repeat(1, 8, 1)
    bank = torch.randn(9, 4, generator=generator, dtype=torch.float64)
    bank[[2, 5]] = 0  # never seen
    tokens, mask = torch.tensor([3, 2]).repeat(4), torch.ones(8, dtype=torch.bool)

    def draw(count: int) -> Tensor:
        return torch.stack(
            [
                vocabulary_contrastive(
                    student, teacher, mask, bank=bank, tokens=tokens, num_negatives=count, generator=generator
                )
                for _ in range(600)
            ]
        )

    positive = cosine_similarity(student[0], teacher[0], dim=-1) / 0.1
    scores = cosine_similarity(student[:1], bank, dim=-1) / 0.1
    for own, start in ((3, 0), (2, 1)):
        others = [row for row in range(9) if row not in (2, 5, own)]
        for count in (1, 2):
            sets = list(combinations(others, count))
            values = torch.stack([torch.cat([positive[None], scores[list(each)]]).logsumexp(0) for each in sets])
            found = (draw(count)[:, start::2].reshape(-1, 1) + positive - values).abs()
            assert found.amin(-1).max() < 1e-9  # no other set of rows, and no row twice
            share = torch.bincount(found.argmin(-1), minlength=len(sets)) / len(found)
            torch.testing.assert_close(share, torch.full_like(share, 1 / len(sets)), atol=0.03, rtol=0)


@pytest.mark.slow
@law
@given(case=vocabularies(), count=st.integers(1, 9), seed=st.integers(0, 99))
def test_draws_from_the_vocabulary_repeat_and_ignore_padding(
    case: tuple[Tensor, Tensor, Tensor, Tensor, Tensor], count: int, seed: int
) -> None:
    student, teacher, mask, tokens, bank = case
    results = []
    for padding in (0.0, math.nan):
        s, t = (x.detach().where(mask.unsqueeze(-1), padding).requires_grad_() for x in (student, teacher))
        loss = vocabulary_contrastive(
            s, t, mask, bank=bank, tokens=tokens, num_negatives=count, momentum=0.5,
            generator=torch.Generator().manual_seed(seed),
        )  # fmt: skip
        results.append((loss, *torch.autograd.grad(loss.sum(), (s, t))))
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)
        assert (clean[~mask] == 0).all()
    assert (results[0][0] >= -1e-12).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_negatives": 0}, "num_negatives"),
        ({"temperature": 0.0}, "temperature"),
        ({"bank": BANK[:, :1]}, "bank must"),
        ({"bank": BANK[0]}, "bank must"),
        ({"tokens": torch.tensor([0])}, "tokens"),
        ({"mask": REAL[:1]}, "mask"),
    ],
)
def test_a_vocabulary_that_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    fitting: dict[str, Any] = {"mask": REAL, "bank": BANK, "tokens": torch.arange(3), "num_negatives": 2}
    with pytest.raises(ValueError, match=message):
        vocabulary_contrastive(STUDENT, TEACHER, **fitting | options)


def test_smoothed() -> None:
    assert torch.equal(smoothed(STUDENT, None, momentum=0.0), STUDENT)
    torch.testing.assert_close(smoothed(STUDENT, BANK, momentum=0.25), 0.25 * BANK + 0.75 * STUDENT)


@law
@given(seed=st.integers(0, 2**31), tokens=st.integers(0, 12))
def test_bank_averages_what_it_sees_and_keeps_the_rest(seed: int, tokens: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    bank = torch.randn(6, 3, generator=generator)
    ids = torch.randint(6, (2, tokens), generator=generator)
    values = torch.randn(2, tokens, 3, generator=generator, requires_grad=True)
    mask = torch.rand(2, tokens, generator=generator) < 0.7
    before = bank.clone()
    after = update_bank(bank, ids, values, mask)
    assert torch.equal(bank, before) and not after.requires_grad
    for row in range(6):
        seen = mask & (ids == row)
        if seen.any():
            torch.testing.assert_close(after[row], values[seen].mean(0))
        else:
            assert torch.equal(after[row], before[row])
