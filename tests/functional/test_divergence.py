"""Laws, golden values and a full-sort reference for the divergences between next-token distributions."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.functional import divergence as d

law = settings(max_examples=40, deadline=None, derandomize=True)

ALL: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "forward_kl": d.forward_kl,
    "reverse_kl": d.reverse_kl,
    "adaptive_kl": d.adaptive_kl,
    "adaptive_kl_inclusive": partial(d.adaptive_kl, head_rule="inclusive"),
    "jensen_shannon_0": partial(d.jensen_shannon, beta=0.0),
    "jensen_shannon": partial(d.jensen_shannon, beta=0.3),
    "jensen_shannon_1": partial(d.jensen_shannon, beta=1.0),
    "skew_forward_kl": d.skew_forward_kl,
    "skew_reverse_kl": d.skew_reverse_kl,
    "skew_forward_kl_0": partial(d.skew_forward_kl, alpha=0.0),
    "skew_reverse_kl_0": partial(d.skew_reverse_kl, alpha=0.0),
    "total_variation": d.total_variation,
}
every = pytest.mark.parametrize("name", ALL)

TEACHER = torch.tensor([1, 0.5, 0, -0.5, -1], dtype=torch.float64)
STUDENT = torch.tensor([0, 0.3, 0.2, -0.1, 0.4], dtype=torch.float64)
TEACHER_2 = torch.tensor([3, 0, 0, -1, -2], dtype=torch.float64)
STUDENT_2 = torch.tensor([1, 0.5, -0.5, 0, 0], dtype=torch.float64)


@st.composite
def logits(draw: st.DrawFn, max_vocabulary: int = 40) -> tuple[Tensor, Tensor]:
    """Student and teacher logits in float64: near uniform to one sure token, with or without equal teacher logits."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = draw(st.integers(1, 4)), draw(st.integers(2, max_vocabulary))
    spread = draw(st.sampled_from([0.0, 1e-3, 1.0, 4.0, 20.0]))
    teacher = spread * torch.randn(shape, generator=generator, dtype=torch.float64)
    if draw(st.booleans()):
        teacher = teacher.round()
    return teacher + torch.randn(shape, generator=generator, dtype=torch.float64), teacher


def full_sort(student: Tensor, teacher: Tensor, head_mass: float, head_rule: str) -> Tensor:
    """Adaptive KL of one row, token by token down the sorted teacher."""
    p, q = teacher.softmax(-1), student.softmax(-1)
    gap = (p - q).abs()
    mass, head = 0.0, 0.0
    for k, v in enumerate(p.argsort(descending=True, stable=True).tolist()):
        if head_rule == "exclusive" and k > 0 and mass + p[v].item() > head_mass:
            break
        if head_rule == "inclusive" and mass >= head_mass:
            break
        mass, head = mass + p[v].item(), head + gap[v].item()
    w = head / gap.sum().item()
    log_ratio = teacher.log_softmax(-1) - student.log_softmax(-1)
    return w * (p * log_ratio).sum() - (1 - w) * (q * log_ratio).sum()


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (d.forward_kl, 0.268937296),
        (d.reverse_kl, 0.299445291),
        (d.adaptive_kl, 0.285939996),
        (partial(d.adaptive_kl, head_rule="inclusive"), 0.284191293),
        (partial(d.jensen_shannon, beta=0.5), 0.067118),
        (partial(d.jensen_shannon, beta=0.1), 0.024017),
        (partial(d.jensen_shannon, beta=0.9), 0.026007),
        (d.skew_forward_kl, 0.214901),
        (d.skew_reverse_kl, 0.226851),
    ],
)
def test_golden(function: Callable[[Tensor, Tensor], Tensor], expected: float) -> None:
    assert function(STUDENT, TEACHER).item() == pytest.approx(expected, abs=6e-7)


def test_golden_where_head_and_tail_gaps_agree() -> None:
    assert d.forward_kl(STUDENT_2, TEACHER_2).item() == pytest.approx(0.574767792, abs=1e-9)
    assert d.reverse_kl(STUDENT_2, TEACHER_2).item() == pytest.approx(0.900653116, abs=1e-9)
    for rule in ("exclusive", "inclusive"):
        assert d.adaptive_kl(STUDENT_2, TEACHER_2, head_rule=rule).item() == pytest.approx(0.737710454, abs=1e-9)


@every
@law
@given(pair=logits())
def test_nonnegative_and_blind_to_a_shift(name: str, pair: tuple[Tensor, Tensor]) -> None:
    student, teacher = pair
    loss = ALL[name](student, teacher)
    assert loss.shape == student.shape[:-1]
    assert (loss >= -1e-12).all()
    torch.testing.assert_close(ALL[name](student + 7.0, teacher - 3.0), loss, rtol=1e-9, atol=1e-10)


@every
@law
@given(pair=logits())
def test_zero_with_a_zero_gradient_where_the_two_agree(name: str, pair: tuple[Tensor, Tensor]) -> None:
    student = pair[1].float().requires_grad_()
    loss = ALL[name](student, student.detach())
    loss.sum().backward()
    assert loss.abs().max() <= 1e-6
    assert student.grad is not None and student.grad.abs().max() <= 1e-6


@every
def test_finite_where_a_logit_is_minus_infinity(name: str) -> None:
    for student_gone, teacher_gone in [([0], []), ([], [0]), ([0], [0]), ([0, 1], [1, 4])]:
        student, teacher = STUDENT.clone().requires_grad_(), TEACHER.clone()
        ruled_out = student.index_fill(0, torch.tensor(student_gone, dtype=torch.long), -math.inf)
        teacher[teacher_gone] = -math.inf
        loss = ALL[name](ruled_out, teacher)
        loss.backward()
        assert 0 <= loss <= 1e4
        assert student.grad is not None and student.grad.isfinite().all()


@every
def test_a_token_ruled_out_by_both_does_not_count(name: str) -> None:
    gone = torch.tensor([-math.inf], dtype=torch.float64)
    with_it = ALL[name](torch.cat([STUDENT, gone]), torch.cat([TEACHER, gone]))
    torch.testing.assert_close(with_it, ALL[name](STUDENT, TEACHER))


@every
def test_half_precision_is_promoted_and_the_teacher_is_constant(name: str) -> None:
    student, teacher = STUDENT.bfloat16().requires_grad_(), TEACHER.bfloat16().requires_grad_()
    loss = ALL[name](student, teacher)
    loss.backward()
    assert loss.dtype == torch.float32
    assert student.grad is not None and student.grad.dtype == torch.bfloat16
    assert teacher.grad is None
    torch.testing.assert_close(loss, ALL[name](student.detach().float(), teacher.detach().float()))


@every
def test_shapes_that_differ_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="one shape"):
        ALL[name](torch.zeros(2, 5), torch.zeros(1, 5))


@pytest.mark.parametrize("name", [name for name in ALL if "adaptive" not in name])  # its weight has no gradient
def test_gradient_is_that_of_finite_differences(name: str) -> None:
    student = torch.stack([STUDENT, STUDENT_2]).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: ALL[name](s, torch.stack([TEACHER, TEACHER_2])), student)


@law
@given(pair=logits())
def test_gradient_identities(pair: tuple[Tensor, Tensor]) -> None:
    student, teacher = pair[0].requires_grad_(), pair[1]
    q, p = student.detach().softmax(-1), teacher.softmax(-1)
    (forward,) = torch.autograd.grad(d.forward_kl(student, teacher).sum(), student)
    torch.testing.assert_close(forward, q - p)
    loss = d.reverse_kl(student, teacher)
    (reverse,) = torch.autograd.grad(loss.sum(), student)
    log_ratio = student.detach().log_softmax(-1) - teacher.log_softmax(-1)
    torch.testing.assert_close(reverse, q * (log_ratio - loss.detach().unsqueeze(-1)), atol=1e-10, rtol=1e-7)


@law
@given(pair=logits(), beta=st.floats(0.01, 0.99))
def test_jensen_shannon_bounds_symmetry_and_limits(pair: tuple[Tensor, Tensor], beta: float) -> None:
    loss = d.jensen_shannon(*pair, beta=beta)
    entropy = -beta * math.log(beta) - (1 - beta) * math.log1p(-beta)
    assert (loss <= entropy + 1e-12).all()
    torch.testing.assert_close(d.jensen_shannon(*pair[::-1], beta=1 - beta), loss, atol=1e-12, rtol=1e-9)
    assert torch.equal(d.jensen_shannon(*pair, beta=0.0), d.forward_kl(*pair))
    assert torch.equal(d.jensen_shannon(*pair, beta=1.0), d.reverse_kl(*pair))
    mild = pair[0].clamp(-3, 3), pair[1].clamp(-3, 3)
    torch.testing.assert_close(d.jensen_shannon(*mild, beta=1e-7) / 1e-7, d.forward_kl(*mild), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(d.jensen_shannon(*mild, beta=1 - 1e-7) / 1e-7, d.reverse_kl(*mild), rtol=1e-3, atol=1e-6)


@law
@given(pair=logits(), alpha=st.floats(0.01, 0.99))
def test_skew_bounds_and_symmetry(pair: tuple[Tensor, Tensor], alpha: float) -> None:
    forward, reverse = d.skew_forward_kl(*pair, alpha=alpha), d.skew_reverse_kl(*pair, alpha=alpha)
    assert (forward <= -math.log(alpha) + 1e-12).all() and (reverse <= -math.log(alpha) + 1e-12).all()
    torch.testing.assert_close(d.skew_reverse_kl(*pair[::-1], alpha=alpha), forward)


@law
@given(pair=logits())
def test_total_variation_bounds(pair: tuple[Tensor, Tensor]) -> None:
    distance = d.total_variation(*pair)
    assert (distance <= 1 + 1e-12).all()
    assert (distance <= (d.forward_kl(*pair) / 2).sqrt() + 1e-9).all()  # Pinsker


@pytest.mark.parametrize("head_rule", ["exclusive", "inclusive"])
@law
@given(pair=logits(max_vocabulary=600), head_mass=st.sampled_from([0.05, 0.45, 0.5, 0.9]))
def test_adaptive_equals_a_full_sort(head_rule: d.HeadRule, pair: tuple[Tensor, Tensor], head_mass: float) -> None:
    student, teacher = pair
    reached = teacher.softmax(-1).sort(-1, descending=True).values.cumsum(-1)
    assume(((reached - head_mass).abs() > 1e-12).all())  # at equality rounding decides which side the head ends on
    expected = [full_sort(s, t, head_mass, head_rule) for s, t in zip(student, teacher, strict=True)]
    loss = d.adaptive_kl(student, teacher, head_mass=head_mass, head_rule=head_rule)
    torch.testing.assert_close(loss, torch.stack(expected), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("head_rule", ["exclusive", "inclusive"])
def test_adaptive_equals_a_full_sort_over_many_blocks(head_rule: d.HeadRule, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(d, "_BLOCK_ELEMENTS", 2 * 5000)
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([[0.01], [0.5], [1.0], [2.0], [9.0]], dtype=torch.float64)
    teacher = spread * torch.randn(5, 5000, generator=generator, dtype=torch.float64)
    student = teacher + torch.randn(5, 5000, generator=generator, dtype=torch.float64)
    expected = [full_sort(s, t, 0.5, head_rule) for s, t in zip(student, teacher, strict=True)]
    loss = d.adaptive_kl(student.view(1, 5, -1), teacher.view(1, 5, -1), head_rule=head_rule)
    torch.testing.assert_close(loss, torch.stack(expected).view(1, 5), rtol=1e-9, atol=1e-10)


@law
@given(pair=logits(max_vocabulary=200))
def test_adaptive_gradient(pair: tuple[Tensor, Tensor]) -> None:
    """The gradient is w times forward KL's and 1 - w times reverse KL's, w = (AKL - RKL) / (FKL - RKL)."""
    student, teacher = pair[0].requires_grad_(), pair[1]
    forward, reverse = d.forward_kl(student, teacher), d.reverse_kl(student, teacher)
    adaptive = d.adaptive_kl(student, teacher)
    clear = (forward - reverse).abs() > 1e-3
    w = ((adaptive - reverse) / (forward - reverse)).detach()
    upstream = torch.arange(1.0, len(w) + 1, dtype=w.dtype) * clear
    mixed = (upstream * (w.where(clear, 0) * forward + (1 - w.where(clear, 0)) * reverse)).sum()
    (expected,) = torch.autograd.grad(mixed, student)
    (gradient,) = torch.autograd.grad((upstream * adaptive).sum(), student)
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-8)


@law
@given(pair=logits(), tilt=st.floats(0.05, 0.9))
def test_adaptive_is_the_mean_where_head_and_tail_gaps_agree(pair: tuple[Tensor, Tensor], tilt: float) -> None:
    """If the student takes mass from the head alone and gives it to the tail alone, the two gaps are equal."""
    p = pair[1].softmax(-1)
    mass, order = p.sort(dim=-1, descending=True, stable=True)
    in_head = (mass.cumsum(-1) <= 0.5) | (torch.arange(p.shape[-1]) == 0)
    head = torch.zeros_like(in_head).scatter(-1, order, in_head)
    moved = tilt * (p * head).sum(-1, keepdim=True)
    tail_mass = (p * ~head).sum(-1, keepdim=True)
    q = torch.where(head, p * (1 - tilt), p * (1 + moved / tail_mass))
    loss = d.adaptive_kl(q.log(), p.log())
    mean = (d.forward_kl(q.log(), p.log()) + d.reverse_kl(q.log(), p.log())) / 2
    torch.testing.assert_close(loss, mean, rtol=1e-6, atol=1e-9)


def test_adaptive_under_no_grad_and_empty_batch() -> None:
    with torch.no_grad():
        assert d.adaptive_kl(STUDENT, TEACHER).item() == pytest.approx(0.285939996, abs=1e-9)
    assert d.adaptive_kl(torch.zeros(0, 7), torch.zeros(0, 7)).shape == (0,)


@pytest.mark.parametrize(
    "call",
    [
        partial(d.adaptive_kl, head_mass=0.0),
        partial(d.adaptive_kl, head_mass=1.0),
        partial(d.adaptive_kl, head_rule="code"),  # type: ignore[arg-type]
        partial(d.jensen_shannon, beta=-0.1),
        partial(d.jensen_shannon, beta=1.1),
        partial(d.skew_forward_kl, alpha=1.0),
        partial(d.skew_reverse_kl, alpha=-0.1),
    ],
)
def test_options_out_of_range_are_refused(call: Callable[[Tensor, Tensor], Tensor]) -> None:
    with pytest.raises(ValueError, match="must"):
        call(STUDENT, TEACHER)
