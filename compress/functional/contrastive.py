"""Token-level contrastive distillation and its memory bank (Tao et al., QuantGPT, arXiv 2203.10705, section 3.1).

Shapes: T tokens of a sequence, D projected features, V rows of the bank; `...` any leading (batch) dimensions.
"""

import math
from typing import Literal

import torch
from torch import Tensor

Negatives = Literal["teacher", "student"]


def token_contrastive(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor,
    *,
    temperature: float = 0.1,
    bank: Tensor | None = None,
    momentum: float = 0.0,
    positive_in_denominator: bool = True,
    num_negatives: int | None = None,
    exclude_duplicates_of: Tensor | None = None,
    generator: torch.Generator | None = None,
    negatives: Negatives = "teacher",
) -> Tensor:
    """Return -log [ exp(s(q_i, t_i) / tau) / sum_{j in S_i} exp(s(q_i, t_j) / tau) ] for each token i; s is the cosine.

    q is the student smoothed with the bank (see `smoothed`) and t the teacher. The negatives of a token are the other
    real tokens of its sequence. QuantGPT (arXiv 2203.10705, equations 1 and 2), here one loss per token.

    Args:
        student: projected hidden states [..., T, D]; gradient flows to them, and to the teacher's (its projection).
        teacher: projected hidden states [..., T, D].
        mask: [..., T], True = a real token. Masked tokens are not used as anchors, positives or negatives.
        temperature: tau > 0.
        bank: the bank's rows gathered for these tokens [..., T, D]; no gradient flows to it.
        momentum: m in [0, 1); values above 0 need a bank.
        positive_in_denominator: whether S_i contains i (InfoNCE, at least 0) or only the negatives (can be below 0).
        num_negatives: how many negatives each token draws from its sequence; None = all.
        exclude_duplicates_of: token ids [..., T]; tokens with the id of the anchor are then not used as negatives.
        generator: for the draw, on the device of `student`.
        negatives: "teacher" if t_j, j != i, are the teacher's states; "student" if they are the student's (unsmoothed).

    Returns:
        [..., T] in float32 or wider. Masked tokens and tokens without negatives are 0 and have no gradient. A state of
        zeros has cosine 0 with every state and receives no gradient.

    Raises:
        ValueError: shapes that do not match, or an option outside its range.
    """
    _check_options(temperature, num_negatives, negatives)
    _check_shapes(student, teacher, mask)
    mask = mask.bool()
    states, targets = _unit(student, mask), _unit(teacher, mask)
    anchors = _unit(smoothed(student, bank, momentum=momentum), mask)
    positive = (anchors * targets).sum(-1) / temperature

    itself = torch.eye(mask.shape[-1], dtype=torch.bool, device=mask.device)
    allowed = mask.unsqueeze(-1) & mask.unsqueeze(-2) & ~itself
    if exclude_duplicates_of is not None:
        allowed = allowed & (exclude_duplicates_of.unsqueeze(-1) != exclude_duplicates_of.unsqueeze(-2))
    if num_negatives is not None:
        allowed = _sample(allowed, num_negatives, generator)
    # A token without negatives keeps its positive, so that its loss is 0 under both rules, with a gradient of 0.
    keep_positive = itself if positive_in_denominator else itself & ~allowed.any(-1, keepdim=True)

    others = targets if negatives == "teacher" else states
    scores = anchors @ others.transpose(-1, -2) / temperature
    scores = torch.where(itself, positive.unsqueeze(-1), scores)
    return scores.masked_fill(~(allowed | keep_positive), -math.inf).logsumexp(-1) - positive


def vocabulary_contrastive(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor,
    *,
    bank: Tensor,
    tokens: Tensor,
    num_negatives: int,
    temperature: float = 0.1,
    momentum: float = 0.0,
    positive_in_denominator: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return -log [ exp(s(q_i, t_i) / tau) / sum_{j in S_i} exp(s(q_i, b_j) / tau) ], negatives from the vocabulary.

    Like `token_contrastive`, with the random negatives that QuantGPT compares (arXiv 2203.10705): `num_negatives` rows
    b of the bank [V, D] per token, drawn uniformly without replacement, or all rows if there are fewer. Rows of zeros
    (ids not seen yet) and the row of the token's own id are not drawn. `tokens` [..., T] are the token ids; they also
    select the row that smooths q. No gradient flows to the bank.

    Memory: `num_negatives` x D numbers per token. Returns [..., T] and raises ValueError as `token_contrastive` does.
    """
    _check_options(temperature, num_negatives)
    _check_shapes(student, teacher, mask)
    if bank.ndim != 2 or bank.shape[-1] != student.shape[-1] or tokens.shape != mask.shape:
        shapes = tuple(bank.shape), tuple(tokens.shape)
        raise ValueError(f"bank must be [V, D] and tokens [..., T], got {shapes} for {tuple(student.shape)}")
    mask, bank = mask.bool(), bank.detach()
    anchors = _unit(smoothed(student, bank[tokens], momentum=momentum), mask)
    positive = (anchors * _unit(teacher, mask)).sum(-1, keepdim=True) / temperature

    rows, allowed = _draw(bank, tokens, num_negatives, generator)
    allowed = allowed & mask.unsqueeze(-1)
    keep_positive = positive_in_denominator | ~allowed.any(-1, keepdim=True)
    others = _unit(bank, bank.any(-1)).to(anchors.dtype)[rows]
    scores = torch.cat([positive, (others @ anchors.unsqueeze(-1)).squeeze(-1) / temperature], -1)
    scores = scores.masked_fill(~torch.cat([keep_positive, allowed], -1), -math.inf)
    return scores.logsumexp(-1) - positive.squeeze(-1)


def smoothed(student: Tensor, bank: Tensor | None, *, momentum: float) -> Tensor:
    """Return the anchors q = m stopgrad(bank) + (1 - m) student [..., T, D]; callers write them to the bank, detached.

    QuantGPT (arXiv 2203.10705, section 3.1). m = 0 returns the student. Raises ValueError if m is outside
    [0, 1), or above 0 without a bank of the student's shape.
    """
    if not 0.0 <= momentum < 1.0:
        raise ValueError(f"momentum must lie in [0, 1), got {momentum}")
    if momentum == 0.0:
        return student
    if bank is None or bank.shape != student.shape:
        shape = None if bank is None else tuple(bank.shape)
        raise ValueError(f"momentum {momentum} needs the bank's rows of shape {tuple(student.shape)}, got {shape}")
    return momentum * bank.detach() + (1.0 - momentum) * student


def update_bank(bank: Tensor, ids: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Return a new bank [V, D]. The row of each token id in `ids` is the mean of its values; other rows are unchanged.

    Args:
        bank: [V, D], one row per token id; zero for ids not seen yet.
        ids: token ids [...].
        values: [..., D], one vector per token; written without gradient.
        mask: [...], True = a real token; masked tokens are not written.

    The mean is a matrix product with a 0/1 matrix instead of an atomic sum, so every run gives the same bits.
    """
    mask = mask.bool()
    seen, member = torch.unique(ids[mask], return_inverse=True)
    belongs = (member == torch.arange(len(seen), device=ids.device).unsqueeze(-1)).to(bank.dtype)
    means = belongs @ values.detach()[mask].to(bank.dtype) / belongs.sum(-1, keepdim=True)
    return bank.detach().index_copy(0, seen, means)


def _check_options(temperature: float, num_negatives: int | None, negatives: str = "teacher") -> None:
    if not temperature > 0.0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    if num_negatives is not None and num_negatives < 1:
        raise ValueError(f"num_negatives must be at least 1 or None, got {num_negatives}")
    if negatives not in ("teacher", "student"):
        raise ValueError(f"negatives must be 'teacher' or 'student', got {negatives!r}")


def _check_shapes(student: Tensor, teacher: Tensor, mask: Tensor) -> None:
    if teacher.shape != student.shape or mask.shape != student.shape[:-1]:
        shapes = tuple(student.shape), tuple(teacher.shape), tuple(mask.shape)
        raise ValueError(f"student and teacher must be [..., T, D] and mask [..., T], got {shapes}")


def _unit(states: Tensor, mask: Tensor) -> Tensor:
    """Normalize rows to length 1, in float32 or wider. Masked rows and rows of zeros become zero."""
    states = states.to(torch.promote_types(states.dtype, torch.float32)).where(mask.unsqueeze(-1), 0.0)
    length: Tensor = torch.linalg.vector_norm(states, dim=-1, keepdim=True)
    return states / length.masked_fill(length == 0, math.inf)


def _draw(bank: Tensor, tokens: Tensor, count: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Draw row numbers [..., T, K] of the bank, and say which are negatives: at most `count`, seen, not its own row.

    All tokens share one shuffled list of the seen rows, and each takes a window of it with a random start. The window
    has `count` + 1 rows in case it contains the token's own row. This avoids one random number per token and row.
    """
    seen = bank.any(-1).nonzero().squeeze(-1)
    seen = seen[torch.randperm(len(seen), generator=generator, device=bank.device)]
    size = max(len(seen), 1)
    start = torch.randint(size, tokens.shape, generator=generator, device=bank.device)
    window = torch.arange(min(count + 1, len(seen)), device=bank.device)
    rows = seen[(start.unsqueeze(-1) + window) % size]
    other = rows != tokens.unsqueeze(-1)
    return rows, other & (other.cumsum(-1) <= count)


def _sample(allowed: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """Choose at most `count` allowed columns of each row [..., T, T], uniformly and without replacement."""
    if count >= allowed.shape[-1]:
        return allowed
    priority = torch.rand(allowed.shape, generator=generator, device=allowed.device).masked_fill(~allowed, -1.0)
    chosen = torch.zeros_like(allowed).scatter(-1, priority.topk(count).indices, True)
    return chosen & allowed
