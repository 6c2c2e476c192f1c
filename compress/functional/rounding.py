"""Parts shared by all weight quantizers: groups with one scale, the rounding rule, and straight-through gradients.

A group is the set of weights that share a scale: the whole tensor (per-tensor, `dim=None`), or one index of the
dimension `dim` (per-channel; `dim=0`: a row). Public functions take and return one value per group, in the shape [] or
[size of dim]; internal functions use a shape that broadcasts against the weight.
"""

from typing import Any

import torch
from torch import Tensor


def levels(bits: int) -> int:
    """Return n = 2^(b-1) - 1, the largest code."""
    if not 2 <= bits <= 8:
        raise ValueError(f"bits must lie in 2..8, got {bits}")
    return (1 << (bits - 1)) - 1


def dequantize(codes: Tensor, scale: Tensor, *, dim: int | None = None) -> Tensor:
    """Return codes * scale in the dtype of the scale: the quantized weight, bit for bit."""
    return codes.to(scale.dtype) * grouped(scale, codes, dim)


def reduced_dims(weight: Tensor, dim: int | None) -> list[int]:
    """Return the dimensions to reduce over for one value per group: all except `dim`."""
    kept = None if dim is None else dim % weight.ndim
    return [d for d in range(weight.ndim) if d != kept]


def group_sum(values: Tensor, dim: int | None) -> Tensor:
    """Return the sum of each group, in a shape that broadcasts against the values."""
    return values.sum(reduced_dims(values, dim), keepdim=True)


def group_mean(values: Tensor, dim: int | None) -> Tensor:
    """Return the mean of each group, in a shape that broadcasts against the values."""
    return values.mean(reduced_dims(values, dim), keepdim=True)


def grouped(values: Tensor, weight: Tensor, dim: int | None) -> Tensor:
    """Reshape one value per group so that it broadcasts against the weight. Raises ValueError for another count."""
    shape = [1] * weight.ndim
    if dim is not None:
        shape[dim] = weight.shape[dim]
    groups = 1 if dim is None else weight.shape[dim]
    if values.numel() != groups:
        raise ValueError(
            f"dim={dim} of a weight {tuple(weight.shape)} needs {groups} value(s), got {tuple(values.shape)}"
        )
    return values.reshape(shape)


def flat(values: Tensor, dim: int | None) -> Tensor:
    """Invert `grouped`: return one value per group as [] or [size of dim]."""
    return values.reshape(()) if dim is None else values.flatten()


def round_clipped(weight: Tensor, clip: Tensor, n: int) -> Tensor:
    """Return round(n clip(w, -alpha, alpha) / alpha), and 0 if alpha <= 0: the rounding rule of all methods."""
    clip = clip.clamp(min=0)
    unit = weight.clamp(-clip, clip) / clip.masked_fill(clip == 0, 1.0)
    return unit.mul_(n).round_().add_(0.0)  # adding 0 turns -0 into 0, as in int8


def clip_scale(clip: Tensor, n: int) -> Tensor:
    """Return the scale, alpha / n, and 0 if alpha <= 0: the value of one step between codes."""
    return clip.clamp(min=0) / n


@torch.no_grad()
def clip_codes(weight: Tensor, clip: Tensor, bits: int, dim: int | None) -> tuple[Tensor, Tensor]:
    """Return (codes, scale) for a clip value that broadcasts against the weight."""
    n = levels(bits)
    return round_clipped(weight, clip, n).to(torch.int8), flat(clip_scale(clip, n), dim)


def clipped_rounding(
    weight: Tensor, clip: Tensor, n: int, *, inside_votes: bool = True, gradient_scale: float = 1.0
) -> Tensor:
    """Return codes * scale for a clip value that broadcasts against the weight, with the gradients below."""
    value: Tensor = _ClippedRounding.apply(weight, clip, n, inside_votes, gradient_scale)  # type: ignore[no-untyped-call]
    return value


class _ClippedRounding(torch.autograd.Function):
    """Quantize to the levels up to a clip value alpha (broadcast against the weight), with a gradient for both.

    dL/dw_i = g_i 1[|w_i| < alpha];  dL/dalpha = gradient_scale sum_i g_i d_i, d = sign(w) where |w| >= alpha, else
    Q(u) - u if `inside_votes`, otherwise 0 (QuantGPT and LSQ: true; PACT: false).
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, clip: Tensor, n: int, inside_votes: bool, gradient_scale: float) -> Tensor:
        ctx.save_for_backward(weight, clip)
        ctx.n, ctx.inside_votes, ctx.gradient_scale = n, inside_votes, gradient_scale
        return round_clipped(weight, clip, n).mul_(clip_scale(clip, n))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        weight, clip = ctx.saved_tensors
        inside = weight.abs() < clip
        grad_weight = grad * inside if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return grad_weight, None, None, None, None
        vote: Tensor | float = 0.0
        if ctx.inside_votes:
            vote = round_clipped(weight, clip, ctx.n) / ctx.n - weight / clip
        direction = torch.where(inside, vote, weight.sign())
        grad_clip = (grad * direction).sum_to_size(clip.shape) * ctx.gradient_scale
        return grad_weight, grad_clip, None, None, None


def straight_through(x: Tensor, value: Tensor) -> Tensor:
    """Return `value` in the dtype of x, without a copy if it has that dtype; x gets the gradient unchanged."""
    result: Tensor = _StraightThrough.apply(x, value)  # type: ignore[no-untyped-call]
    return result


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
