"""Fake quantization of weights and activations: the values that a low-bit kernel uses, with gradients for training.

Weights of b bits are symmetric: w_q = codes * scale, integer codes in {-n, ..., n}, n = 2^(b-1) - 1 (1, 3, 7, 127 for
2, 3, 4, 8 bits). The weights that share a scale are a group: the whole tensor (per-tensor, `dim=None`), or one index of
the dimension `dim` (per-channel; `dim=0`: each row). Methods differ in how they find the clip value alpha = n * scale
(`twn` has a threshold instead). Each has two functions: `method` returns w_q with the gradient of its paper;
`method_codes` returns (codes, scale): int8 codes, and scales of shape [] or [size of dim]. `dequantize` makes the same
w_q of them, bit for bit. Values have the dtype of the weight. Ties round to even. A group of zeros, or one whose clip
value is not positive, quantizes to zero, with finite gradients.

Raises ValueError for bits outside 2..8 and for a parameter without exactly one value per group.
"""

import math

import torch
from torch import Tensor

from compress.functional.rounding import (
    clip_codes,
    clipped_rounding,
    flat,
    group_mean,
    group_sum,
    grouped,
    reduced_dims,
    round_clipped,
    straight_through,
)
from compress.functional.rounding import dequantize as dequantize
from compress.functional.rounding import levels as levels

SCALE_MIN = 1e-6
"""Lower bound of a learned scale."""
_BLOCK_ELEMENTS = 1 << 20  # weights that search_gamma works on at a time
_GRID_POINTS, _GRID_LEVELS = 21, 3
_BEYOND = 6  # codes past max |w| that search_gamma tries


def dynamic_scaling(
    weight: Tensor, gamma: Tensor, *, bits: int, dim: int | None = None, norm_gradient: bool = False
) -> Tensor:
    """Quantize by module-wise dynamic scaling (Tao et al., QuantGPT, arXiv 2203.10705, section 3.2, equation 5).

        alpha = gamma ||w||_1 / N,   w_q = alpha round(n clip(w, -alpha, alpha) / alpha) / n

    over the N weights of a group. gamma ([], or [size of dim]) is clamped to 1e-6 or more. With u = w / alpha:

        dL/dgamma = ||w||_1/N sum_i g_i d_i,   d = sign(w) where |w| >= alpha, else Q(u) - u
        dL/dw_i   = g_i where |w_i| < alpha, else 0        (||w||_1 counts as a constant)

    `norm_gradient` keeps ||w||_1 in the graph, as others do: every weight moves alpha, and dL/dw_i gains
    sign(w_i) gamma/N dL/dalpha with dL/dalpha = sum_i g_i d_i. The values stay the same.
    """
    clip = _dynamic_clip(weight if norm_gradient else weight.detach(), gamma, dim)
    return clipped_rounding(weight, clip, levels(bits))


def dynamic_scaling_codes(weight: Tensor, gamma: Tensor, *, bits: int, dim: int | None = None) -> tuple[Tensor, Tensor]:
    """Quantize like `dynamic_scaling`, but return (codes, scale)."""
    return clip_codes(weight, _dynamic_clip(weight, gamma, dim), bits, dim)


@torch.no_grad()
def search_gamma(weight: Tensor, *, bits: int, dim: int | None = None) -> Tensor:
    """Find the gamma of `dynamic_scaling` that minimises |w - w_q|^2, one per group: [] or [size of dim].

    Not in the paper, which starts at 1 and so clips nearly half of the weights. The search covers gamma = 1 (smaller
    clip values lose more than they gain) up to a few codes past max |w| (a small group at 8 bits can match those
    levels). It tries a logarithmic grid, and then two finer grids around the best point. A group of zeros gets 1.
    """
    n = levels(bits)
    groups = weight.reshape(1, -1) if dim is None else weight.movedim(dim, 0).flatten(1)
    blocks = torch.split(groups, max(1, _BLOCK_ELEMENTS // groups.shape[1]))
    gamma = torch.cat([_search_gamma(block.abs(), n) for block in blocks])
    return gamma.squeeze(0) if dim is None else gamma


def pact(weight: Tensor, alpha: Tensor, *, bits: int, dim: int | None = None) -> Tensor:
    """Quantize by PACT on weights (Choi et al., arXiv 1805.06085, equation 3, made symmetric): alpha itself is learned.

    dL/dalpha = sum over |w_i| >= alpha of g_i sign(w_i);  dL/dw_i = g_i where |w_i| < alpha, else 0.
    """
    return clipped_rounding(weight, grouped(alpha, weight, dim), levels(bits), inside_votes=False)


def pact_codes(weight: Tensor, alpha: Tensor, *, bits: int, dim: int | None = None) -> tuple[Tensor, Tensor]:
    """Quantize like `pact`, but return (codes, scale)."""
    return clip_codes(weight, grouped(alpha, weight, dim), bits, dim)


def lsq(weight: Tensor, step: Tensor, *, bits: int, dim: int | None = None) -> Tensor:
    """Quantize with a learned step size (Esser et al., arXiv 1902.08153, eqs. 1-3): w_q = round(clip(w / s, -n, n)) s.

    dL/ds = sum_i g_i {-n; round(w_i/s) - w_i/s; n} / sqrt(N n), N weights per step;  dL/dw_i = g_i inside, 0 outside.
    The paper's lowest code, -n - 1, is not used, so that all methods share one set of levels.
    """
    n = levels(bits)
    gradient_scale = (weight.numel() // step.numel() * n) ** -0.5
    return clipped_rounding(weight, grouped(step, weight, dim) * n, n, gradient_scale=gradient_scale)


def lsq_codes(weight: Tensor, step: Tensor, *, bits: int, dim: int | None = None) -> tuple[Tensor, Tensor]:
    """Quantize like `lsq`, but return (codes, scale)."""
    return clip_codes(weight, grouped(step, weight, dim) * levels(bits), bits, dim)


def lsq_init(weight: Tensor, *, bits: int, dim: int | None = None) -> Tensor:
    """Return LSQ's first step size, 2 mean|w| / sqrt(n): [] or [size of dim] (arXiv 1902.08153, section 2.1)."""
    return flat(2.0 * group_mean(weight.detach().abs(), dim) / levels(bits) ** 0.5, dim)


def laq(weight: Tensor, curvature: Tensor, *, bits: int, iterations: int = 10, dim: int | None = None) -> Tensor:
    """Quantize loss-aware (Hou & Kwok, LAQ, arXiv 1802.08635, section 3): minimise sum_i d_i (w_i - w_q,i)^2.

    d is a diagonal curvature in the shape of the weight, such as Adam's sqrt(v). Alternates two updates: b = the levels
    nearest to w / alpha, and alpha = ||b d w||_1 / ||b d b||_1. The first clip value is our choice, not the paper's:
    (1 + bits/2) mean|w|, at most max|w|. The gradient passes straight through to the weight.
    """
    codes, scale = laq_codes(weight, curvature, bits=bits, iterations=iterations, dim=dim)
    return straight_through(weight, dequantize(codes, scale, dim=dim))


@torch.no_grad()
def laq_codes(
    weight: Tensor, curvature: Tensor, *, bits: int, iterations: int = 10, dim: int | None = None
) -> tuple[Tensor, Tensor]:
    """Quantize like `laq`, but return (codes, scale)."""
    n = levels(bits)
    size = weight.abs()
    clip = torch.minimum((1 + bits / 2) * group_mean(size, dim), size.amax(reduced_dims(weight, dim), keepdim=True))
    for _ in range(iterations):
        codes = round_clipped(weight, clip, n)
        weighted = curvature * codes
        norm = group_sum(weighted * codes, dim)
        clip = torch.where(norm > 0, n * group_sum(weighted * weight, dim) / norm, clip)
    return clip_codes(weight, clip, bits, dim)


def twn(weight: Tensor, *, dim: int | None = None) -> Tensor:
    """Quantize to ternary weights (Li et al., TWN, arXiv 1605.04711, equations 6 and 5), straight-through gradient.

    Delta = 0.7 mean|w|, alpha = mean of |w| over |w| > Delta, w_q = alpha sign(w) 1[|w| > Delta].
    """
    codes, scale = twn_codes(weight, dim=dim)
    return straight_through(weight, dequantize(codes, scale, dim=dim))


@torch.no_grad()
def twn_codes(weight: Tensor, *, dim: int | None = None) -> tuple[Tensor, Tensor]:
    """Quantize like `twn`, but return (codes, scale)."""
    size = weight.abs()
    kept = size > 0.7 * group_mean(size, dim)
    alpha = group_sum(size * kept, dim) / group_sum(kept, dim).clamp(min=1)
    return (weight.sign() * kept).to(torch.int8), flat(alpha, dim)


def round_to_nearest(weight: Tensor, *, bits: int, dim: int | None = None) -> Tensor:
    """Round to the nearest level with alpha = max|w|. No parameter is learned; straight-through gradient."""
    codes, scale = round_to_nearest_codes(weight, bits=bits, dim=dim)
    return straight_through(weight, dequantize(codes, scale, dim=dim))


@torch.no_grad()
def round_to_nearest_codes(weight: Tensor, *, bits: int, dim: int | None = None) -> tuple[Tensor, Tensor]:
    """Quantize like `round_to_nearest`, but return (codes, scale)."""
    return clip_codes(weight, weight.abs().amax(reduced_dims(weight, dim), keepdim=True), bits, dim)


def noise(weight: Tensor, quantized: Tensor, *, p: float, generator: torch.Generator | None = None) -> Tensor:
    """Apply Quant-Noise (Fan et al., arXiv 2004.07320, section 4.2): quantize each weight with probability p.

    The gradient goes through `quantized` for the chosen weights and directly to the others. p = 1 returns `quantized`
    and p = 0 the weight, exactly. `generator` is on the device of the weight. Raises ValueError if p is outside [0, 1].
    """
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"p must lie in [0, 1], got {p}")
    chosen = torch.rand(weight.shape, generator=generator, device=weight.device) < p
    return torch.where(chosen, quantized, weight)


def activation_block(x: Tensor, *, block: int) -> Tensor:
    """Quantize activations to 8 bits like ONNX Runtime's MatMulNBits at accuracy level 4: [..., K] -> [..., K].

    Each run of `block` neighbours of the last dimension has its own scale max|x| / 127; codes round(x 127 / max|x|).
    The last block can be shorter, as padding with zeros changes nothing. Computes in float32 or wider; the result has
    the dtype of x. A block of zeros stays zero. Straight-through gradient. Raises ValueError if block < 1.
    """
    if block < 1:
        raise ValueError(f"block must be at least 1, got {block}")
    return straight_through(x, _round_blocks(_wide(x), block))


def activation_symmetric(x: Tensor, *, bits: int = 8, clip: float | None = None) -> Tensor:
    """Return round(x s) / s, s = n / max|x| over the whole tensor (layer-wise and dynamic, arXiv 2203.10705).

    With `clip`, x is first clipped to [-clip, clip]. Straight-through gradient, 0 outside the clip range.
    """
    if clip is not None:
        x = x.clamp(-clip, clip)
    return straight_through(x, dequantize(*round_to_nearest_codes(_wide(x), bits=bits)))


def activation_asymmetric(x: Tensor, *, bits: int = 8, clip: float | None = None) -> Tensor:
    """Return round((x - beta) s / alpha) / s alpha + beta; beta = min x, alpha = max x - min x + 1e-8, s = 2^bits - 1.

    For the mostly positive outputs of GELU and softmax (arXiv 2203.10705). `clip` and the gradient are those of
    `activation_symmetric`.
    """
    if clip is not None:
        x = x.clamp(-clip, clip)
    steps = 2 * levels(bits) + 1
    values = _wide(x)
    beta = values.min()
    alpha = values.max() - beta + 1e-8
    return straight_through(x, ((values - beta) / alpha * steps).round() / steps * alpha + beta)


def _wide(x: Tensor) -> Tensor:
    return x.detach().to(torch.promote_types(x.dtype, torch.float32))


def _round_blocks(x: Tensor, block: int) -> Tensor:
    size = x.shape[-1]
    whole = torch.nn.functional.pad(x, (0, -size % block)) if size % block else x
    blocks = whole.reshape(*x.shape[:-1], -1, block)
    largest = blocks.abs().amax(-1, keepdim=True)
    codes = (blocks * (127.0 / largest.masked_fill(largest == 0, 1.0))).round_()
    return codes.mul_(largest / 127.0).flatten(-2)[..., :size]


def _search_gamma(size: Tensor, n: int) -> Tensor:
    """Compute `search_gamma` for groups [G, E] of |w| -> [G]."""
    mean = size.mean(-1, keepdim=True)
    best = (size.amax(-1, keepdim=True) / mean.where(mean > 0, 1.0)).clamp(min=1.0).log()
    least = _clipping_error(size, best.exp() * mean, n)
    widest = best + math.log1p(_BEYOND / n)
    low, high = torch.zeros_like(widest), widest
    for _ in range(_GRID_LEVELS):
        step = (high - low) / (_GRID_POINTS - 1)
        for point in range(_GRID_POINTS):
            candidate = low + point * step
            error = _clipping_error(size, candidate.exp() * mean, n)
            best = torch.where(error < least, candidate, best)
            least = torch.minimum(error, least)
        low, high = (best - step).clamp(min=0), torch.minimum(best + step, widest)
    return best.exp().squeeze(-1)


def _clipping_error(size: Tensor, clip: Tensor, n: int) -> Tensor:
    """Return |w - w_q|^2 of each group, from |w| [G, E] and clip [G, 1] -> [G, 1]."""
    scale = clip.where(clip > 0, 1.0) / n
    value = (size / scale).clamp_(max=n).round_().mul_(scale)
    return value.sub_(size).square_().sum(-1, keepdim=True)


def _dynamic_clip(weight: Tensor, gamma: Tensor, dim: int | None) -> Tensor:
    return grouped(gamma.clamp(min=SCALE_MIN), weight, dim) * group_mean(weight.abs(), dim)
