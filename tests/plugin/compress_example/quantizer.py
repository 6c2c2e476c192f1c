"""A weight quantizer: scales are powers of two, so that a product with one is a shift."""

import torch
from torch import Tensor

from compress.functional.rounding import clip_codes, dequantize, levels, reduced_dims, straight_through
from compress.surgery.quantization.methods import Method


@torch.no_grad()
def codes(weight: Tensor, *, bits: int, dim: int | None = None) -> tuple[Tensor, Tensor]:
    """Codes and scales of ``value``: int8 like the weight, and [] or [rows]."""
    largest = weight.abs().amax(reduced_dims(weight, dim), keepdim=True)
    step = torch.where(largest > 0, torch.exp2(torch.ceil(torch.log2(largest / levels(bits)))), 0.0)
    return clip_codes(weight, step * levels(bits), bits, dim)


def value(weight: Tensor, *, bits: int, dim: int | None = None) -> Tensor:
    """Round to multiples of the least power of two that holds max |w|; straight-through gradient."""
    found, scale = codes(weight, bits=bits, dim=dim)
    return straight_through(weight, dequantize(found, scale, dim=dim))


POWER_OF_TWO = Method(value, codes)
