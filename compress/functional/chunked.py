"""Losses over the vocabulary in chunks of tokens, so that no [tokens, vocabulary] tensor is ever allocated.

Shapes: N tokens, D hidden size, K losses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Sums = Callable[[slice, Tensor], Tensor]
"""Maps the slice of a chunk and its states to the losses summed over the chunk, [K]."""


def chunked_means(
    sums: Sums, size: int, weights_K: Tensor, states_ND: Tensor, head: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the weighted sum of K mean losses over N tokens, and the means [K], which carry no gradient.

    ``sums(rows, states)`` sees ``size`` tokens at a time. Gradient flows to ``states_ND`` and to ``head``, the tensors
    that ``sums`` multiplies the states by. Without tokens the result is zero.
    """
    result: tuple[Tensor, Tensor] = _ChunkedMeans.apply(sums, size, weights_K, states_ND, *head)  # type: ignore[no-untyped-call]
    return result


class _ChunkedMeans(torch.autograd.Function):
    """Means of per-token losses over chunks of tokens. The forward pass computes the gradient of each chunk at once.

    It keeps only the gradients of the states and of the head tensors, and computes no logits twice. Head gradients are
    accumulated in float32 or wider and rounded once, so the result does not depend on the number of chunks.
    ``sums(rows, states)`` returns the summed losses [K] of a chunk.
    """

    @staticmethod
    def forward(
        ctx: Any,
        sums: Sums,
        size: int,
        weights_K: Tensor,
        states_ND: Tensor,
        *head: Tensor,
    ) -> tuple[Tensor, Tensor]:
        wanted = [at for at, tensor in enumerate(head) if ctx.needs_input_grad[4 + at]]
        slopes: list[Tensor | None] = [None] * len(head)
        for at in wanted:
            slopes[at] = torch.zeros_like(head[at], dtype=torch.promote_types(head[at].dtype, torch.float32))
        slope_ND = torch.zeros_like(states_ND) if ctx.needs_input_grad[3] else None
        total_K = torch.zeros_like(weights_K)
        count = max(len(states_ND), 1)
        for start in range(0, len(states_ND), size):
            rows = slice(start, start + size)
            with torch.set_grad_enabled(slope_ND is not None or bool(wanted)):
                states = states_ND[rows].detach().requires_grad_(slope_ND is not None)
                losses_K = sums(rows, states)
                share = (losses_K * (weights_K / count)).sum()  # autocast would round a matrix product
            total_K += losses_K.detach()
            if share.requires_grad:
                inputs = ([states] if slope_ND is not None else []) + [head[at] for at in wanted]
                grads = list(torch.autograd.grad(share, inputs))
                if slope_ND is not None:
                    slope_ND[rows] = grads.pop(0)
                for at, grad in zip(wanted, grads, strict=True):
                    slopes[at] += grad  # type: ignore[operator]
        ctx.slopes, ctx.dtypes = (slope_ND, *slopes), [tensor.dtype for tensor in (states_ND, *head)]
        means_K = total_K / count
        ctx.mark_non_differentiable(means_K)
        return (means_K * weights_K).sum(), means_K

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.slopes is None:
            raise RuntimeError("chunked_means cannot run backward a second time: its gradients were scaled in place")
        slopes, ctx.slopes = ctx.slopes, None
        scaled = zip(slopes, ctx.dtypes, strict=True)
        return (None, None, None, *(None if slope is None else slope.mul_(grad).to(dtype) for slope, dtype in scaled))
