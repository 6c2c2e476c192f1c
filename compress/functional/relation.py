"""Self-attention relation distillation (Wang et al., MiniLMv2, arXiv 2012.15828)."""

import math

import torch
from torch import Tensor

from compress.functional.divergence import forward_kl


def attention_relation(
    student: Tensor, teacher: Tensor, *, heads: int, causal: bool, mask: Tensor | None = None
) -> Tensor:
    """Return KL(R^T_i || R^S_i) for each relation head and query row i, with R = softmax(X X^T / sqrt(d_r)).

    MiniLMv2 (arXiv 2012.15828, section 3.1). X holds the queries, keys or values of all attention
    heads, concatenated and split into `heads` relation heads of size d_r = D / heads. Student and teacher may differ in
    hidden size and number of heads.

    Args:
        student: X of the student [B, T, Ds].
        teacher: X of the teacher [B, T, Dt]; receives no gradient.
        heads: number of relation heads; divides Ds and Dt.
        causal: whether row i sees only columns up to i (before the softmax), as in a decoder.
        mask: [B, T], True = a real token; others are masked out as columns. None = all are real.

    Returns:
        [B, heads, T] in float32 or wider, unreduced. Rows of masked tokens are 0 and have no gradient.

    Raises:
        ValueError: heads does not divide a hidden size, or shapes do not match.
    """
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            f"student and teacher must share [B, T], got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    if mask is None:
        mask = torch.ones(student.shape[:-1], dtype=torch.bool, device=student.device)
    elif mask.shape != student.shape[:-1]:
        raise ValueError(f"mask must have the shape {tuple(student.shape[:-1])}, got {tuple(mask.shape)}")
    mask = mask.bool()
    visible = mask.unsqueeze(-2).expand(*mask.shape, mask.shape[-1])
    if causal:
        visible = visible.tril()
    visible = visible | torch.eye(mask.shape[-1], dtype=torch.bool, device=mask.device)  # so that no row is empty
    hidden = ~visible.unsqueeze(-3)
    relations = [_scores(x, heads, mask).masked_fill(hidden, -math.inf) for x in (student, teacher.detach())]
    return forward_kl(*relations)  # the rows of masked tokens are uniform on both sides


def _scores(x: Tensor, heads: int, mask: Tensor) -> Tensor:
    """Return X X^T / sqrt(d_r), [B, T, D] -> [B, heads, T, T]. The values at masked tokens have no influence."""
    size, rest = divmod(x.shape[-1], heads)
    if rest:
        raise ValueError(f"heads {heads} does not divide the hidden size {x.shape[-1]}")
    x = x.to(torch.promote_types(x.dtype, torch.float32)).where(mask.unsqueeze(-1), 0.0)
    x = x.reshape(*x.shape[:-1], heads, size).transpose(-2, -3)
    return x @ x.transpose(-1, -2) / math.sqrt(size)
