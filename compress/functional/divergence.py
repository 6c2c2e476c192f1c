"""Divergences between next-token distributions: functions of logits [..., V] that return one number per token [...].

P = softmax(teacher logits) and Q = softmax(student logits), at temperature 1. Every function computes in float32 or
wider (half precision is promoted) and returns an unreduced tensor that is nonnegative up to rounding and 0 at P = Q.
Gradient flows to the student's logits only. Log-probabilities are clamped at -1e4, where the probability is 0 in every
dtype. A token with a logit of -inf on both sides therefore adds nothing, and one with -inf on a single side adds a
large but finite amount. A row that contains only -inf has no distribution and gives NaN.

Raises ValueError if the two shapes differ. Nothing is broadcast, because a different vocabulary size is a mistake.
"""

import math
from typing import Any, Literal

import torch
from torch import Tensor

HeadRule = Literal["exclusive", "inclusive"]

_FLOOR = -1e4
_BLOCK_ELEMENTS = 1 << 21  # logits that adaptive_kl works on at a time: bounds its memory, and fits a cache
_TOP = 64  # where adaptive_kl looks for the end of the head first
_BINS = 2048  # of the histogram with which it finds the end of a longer one


def forward_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Return KL(P || Q) = sum_v p_v (log p_v - log q_v), [..., V] -> [...]. Its gradient w.r.t. the logits is q - p.

    Equal, up to the teacher's entropy, to the soft cross-entropy of Hinton et al. (arXiv 1503.02531) and of QuantGPT
    (arXiv 2203.10705, section 3.1).
    """
    log_q, log_p = _log_probabilities(student_logits, teacher_logits)
    return _kl(log_p, log_q)


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Return KL(Q || P) = sum_v q_v (log q_v - log p_v), [..., V] -> [...].

    Its gradient with respect to the logits is q_v (log(q_v / p_v) - KL(Q || P)).

    Gu et al., MiniLLM (arXiv 2306.08543), at the token level.
    """
    log_q, log_p = _log_probabilities(student_logits, teacher_logits)
    return _kl(log_q, log_p)


def jensen_shannon(student_logits: Tensor, teacher_logits: Tensor, *, beta: float) -> Tensor:
    """Return beta KL(P || M) + (1 - beta) KL(Q || M), M = beta P + (1 - beta) Q, [..., V] -> [...], at most log 2.

    The generalized Jensen-Shannon divergence of Agarwal et al., GKD (arXiv 2306.13649, equation 1). The formula gives 0
    at beta = 0 and at beta = 1. So that beta interpolates between the two KLs, beta = 0 returns KL(P || Q), the limit
    of JSD / beta, and beta = 1 returns KL(Q || P), the limit of JSD / (1 - beta).

    Raises ValueError where beta lies outside [0, 1].
    """
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta must lie in [0, 1], got {beta}")
    log_q, log_p = _log_probabilities(student_logits, teacher_logits)
    if beta == 0.0:
        return _kl(log_p, log_q)
    if beta == 1.0:
        return _kl(log_q, log_p)
    log_m = _log_mixture(log_p, log_q, beta)
    return beta * _kl(log_p, log_m) + (1.0 - beta) * _kl(log_q, log_m)


def skew_forward_kl(student_logits: Tensor, teacher_logits: Tensor, *, alpha: float = 0.1) -> Tensor:
    """Return KL(P || alpha P + (1 - alpha) Q), [..., V] -> [...], at most -log(alpha).

    Ko et al., DistiLLM (arXiv 2402.03898, equation 3). alpha = 0 is the forward KL. Raises ValueError where alpha lies
    outside [0, 1); at 1 it would be 0 for every student.
    """
    _check_alpha(alpha)
    log_q, log_p = _log_probabilities(student_logits, teacher_logits)
    return _kl(log_p, _log_mixture(log_p, log_q, alpha) if alpha else log_q)


def skew_reverse_kl(student_logits: Tensor, teacher_logits: Tensor, *, alpha: float = 0.1) -> Tensor:
    """Return KL(Q || (1 - alpha) P + alpha Q), [..., V] -> [...], at most -log(alpha).

    Ko et al., DistiLLM (arXiv 2402.03898). alpha = 0 is the reverse KL. Raises ValueError where alpha lies
    outside [0, 1).
    """
    _check_alpha(alpha)
    log_q, log_p = _log_probabilities(student_logits, teacher_logits)
    return _kl(log_q, _log_mixture(log_q, log_p, alpha) if alpha else log_p)


def total_variation(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Return 1/2 sum_v |p_v - q_v|, [..., V] -> [...], in [0, 1]; Wen et al., f-distillation (arXiv 2307.15190)."""
    log_q, log_p = _log_probabilities(student_logits, teacher_logits)
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)


def adaptive_kl(
    student_logits: Tensor, teacher_logits: Tensor, *, head_mass: float = 0.5, head_rule: HeadRule = "exclusive"
) -> Tensor:
    """Return w KL(P || Q) + (1 - w) KL(Q || P), where w is the head's share of sum_v |p_v - q_v|, [..., V] -> [...].

    Wu et al., "Rethinking KL Divergence in KD for LLMs" (arXiv 2404.02657, section 4): with the vocabulary sorted by
    descending p, the head is its most probable part and the tail is the rest; w = g_head / (g_head + g_tail), g = sum
    of |p_v - q_v| over the head or the tail. w carries no gradient, and is 1/2 where P = Q. Tokens of equal p keep the
    order of the vocabulary.

    The head is `exclusive`: the longest run of top tokens whose mass does not exceed `head_mass`, at least one (the
    authors' code), or `inclusive`: the shortest run whose mass reaches `head_mass` (the paper's text).

    The result equals that of a full sort, without sorting whole rows: most heads end within the 64 largest tokens, and
    for longer heads a histogram of the mass limits the tokens to sort. Loss and gradient are computed together, block
    by block, so that only one [..., V] tensor is kept besides the logits.

    Raises ValueError where head_mass lies outside (0, 1) or head_rule is neither of the two.
    """
    if not 0.0 < head_mass < 1.0:
        raise ValueError(f"head_mass must lie in (0, 1), got {head_mass}")
    if head_rule not in ("exclusive", "inclusive"):
        raise ValueError(f"head_rule must be 'exclusive' or 'inclusive', got {head_rule!r}")
    _check_shapes(student_logits, teacher_logits)
    loss: Tensor = _AdaptiveKL.apply(student_logits, teacher_logits.detach(), head_mass, head_rule)  # type: ignore[no-untyped-call]
    return loss


def _check_shapes(student_logits: Tensor, teacher_logits: Tensor) -> None:
    if student_logits.shape != teacher_logits.shape:
        student, teacher = tuple(student_logits.shape), tuple(teacher_logits.shape)
        raise ValueError(f"student_logits and teacher_logits must have one shape, got {student} and {teacher}")


def _check_alpha(alpha: float) -> None:
    if not 0.0 <= alpha < 1.0:
        raise ValueError(f"alpha must lie in [0, 1), got {alpha}")


def _log_probabilities(student_logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return log q and log p, clamped at -1e4, in the widest of float32 and the two dtypes; p carries no gradient."""
    _check_shapes(student_logits, teacher_logits)
    dtype = _compute_dtype(student_logits, teacher_logits)
    log_q = student_logits.log_softmax(-1, dtype=dtype).clamp(min=_FLOOR)
    log_p = teacher_logits.detach().log_softmax(-1, dtype=dtype).clamp_(min=_FLOOR)
    return log_q, log_p


def _compute_dtype(first: Tensor, second: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(first.dtype, second.dtype), torch.float32)


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def _log_mixture(log_a: Tensor, log_b: Tensor, share: float) -> Tensor:
    """Return log(share A + (1 - share) B), for a share in (0, 1)."""
    return torch.logaddexp(log_a + math.log(share), log_b + math.log1p(-share))


class _AdaptiveKL(torch.autograd.Function):
    """Compute adaptive_kl and, in the same forward pass, its gradient, block by block."""

    @staticmethod
    def forward(ctx: Any, student_logits: Tensor, teacher_logits: Tensor, head_mass: float, head_rule: str) -> Tensor:
        vocabulary = student_logits.shape[-1]
        students, teachers = student_logits.reshape(-1, vocabulary), teacher_logits.reshape(-1, vocabulary)
        loss = students.new_empty(len(students), dtype=_compute_dtype(students, teachers))
        slope = torch.empty_like(students) if ctx.needs_input_grad[0] else None
        rows = max(1, _BLOCK_ELEMENTS // vocabulary)
        for start in range(0, len(students), rows):
            block = slice(start, start + rows)
            out = None if slope is None else slope[block]
            loss[block] = _adaptive_block(students[block], teachers[block], head_mass, head_rule, out)
        if slope is not None:
            ctx.save_for_backward(slope.view(student_logits.shape))
        return loss.view(student_logits.shape[:-1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None, None, None]:
        (slope,) = ctx.saved_tensors
        return (slope * grad_loss.unsqueeze(-1)).to(slope.dtype), None, None, None


def _adaptive_block(
    students: Tensor, teachers: Tensor, head_mass: float, head_rule: str, slope: Tensor | None
) -> Tensor:
    """Return the loss [N] of logits [N, V]; write its gradient w.r.t. the student logits to `slope` [N, V], if any."""
    log_q, ratio = _log_probabilities(students, teachers)
    p, q = ratio.exp(), log_q.exp()
    ratio -= log_q
    spare = (p - q).abs_()
    w = _head_share(p, spare, head_mass, head_rule).unsqueeze(-1)
    forward = torch.mul(p, ratio, out=spare).sum(-1, keepdim=True)
    reverse = -torch.mul(q, ratio, out=spare).sum(-1, keepdim=True)
    if slope is not None:
        # w (q - p) + (1 - w) q (-ratio - reverse), in place
        slope.copy_(ratio.add_(reverse).mul_(w - 1).add_(w).mul_(q).addcmul_(p, w, value=-1))
    return (w * forward + (1 - w) * reverse).squeeze(-1)


def _head_share(p: Tensor, gap: Tensor, head_mass: float, head_rule: str) -> Tensor:
    """Return the head's share [N] of each row's sum of `gap` [N, V], |p - q|; 1/2 if the sum is 0."""
    width = min(_TOP, p.shape[-1])
    mass, index = _largest(p, width)
    in_head = _in_head(mass, mass.new_zeros(len(p), 1), head_mass, head_rule)
    head = (gap.gather(-1, index) * in_head).sum(-1)
    if width < p.shape[-1]:
        # A tie outside the top tokens may come earlier in the vocabulary: the head must end above the last top token.
        last = mass.gather(-1, in_head.sum(-1, keepdim=True) - 1)
        rows = (last <= mass[:, -1:]).squeeze(-1).nonzero().squeeze(-1)
        if len(rows):
            head[rows] = _long_head_gap(p[rows], gap[rows], head_mass, head_rule)
    total = gap.sum(-1)
    return torch.where(total > 0, (head / total).clamp(max=1.0), 0.5)


def _long_head_gap(p: Tensor, gap: Tensor, head_mass: float, head_rule: str) -> Tensor:
    """Return the sum of `gap` over the head, [N]. A histogram finds the bin where the head ends; only it is sorted."""
    # Division and square root are monotonic when rounded: a larger p never gets a lower bin, and ties share a bin.
    bins = (p / p.amax(-1, keepdim=True)).sqrt_().sqrt_().mul_(_BINS - 1).long()
    histogram = p.new_zeros(len(p), _BINS).scatter_add_(-1, bins, p)
    reached = histogram.flip(-1).cumsum(-1)
    last_bin = (_BINS - 1 - (reached <= head_mass).sum(-1, keepdim=True)).clamp(min=0)
    above, within = bins > last_bin, bins == last_bin
    mass, index = _largest(p.masked_fill(~within, -1.0), int(within.sum(-1).max()))
    in_head = _in_head(mass, (p * above).sum(-1, keepdim=True), head_mass, head_rule) & (mass >= 0)
    return (gap * above).sum(-1) + (gap.gather(-1, index) * in_head).sum(-1)


def _largest(p: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return the `width` largest values of each row, descending, and their indices. Ties keep vocabulary order."""
    index = p.topk(width, sorted=False).indices.sort(-1).values
    mass, order = p.gather(-1, index).sort(dim=-1, descending=True, stable=True)
    return mass, index.gather(-1, order)


def _in_head(mass: Tensor, above: Tensor, head_mass: float, head_rule: str) -> Tensor:
    """Say which of the sorted tokens [N, K] belong to the head, if tokens before them have the mass `above` [N, 1]."""
    reached = above + mass.cumsum(-1)
    if head_rule == "exclusive":
        in_head = reached <= head_mass
        in_head[:, :1] |= above == 0  # the first token always
        return in_head
    return torch.cat([above, reached[:, :-1]], dim=-1) < head_mass
