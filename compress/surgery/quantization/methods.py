"""The built-in weight quantizers in a common form: initial scale, quantized weight, and codes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from compress.functional import fake_quant as fq
from compress.functional.blocks import by_block, codes_by_block
from compress.registry import QUANTIZERS


@dataclass(frozen=True)
class Method:
    """A weight quantizer. Weights are [O, I]. ``dim=0`` means one scale per row, ``dim=None`` one per matrix."""

    value: Callable[..., Tensor]
    """``value(weight, [state], bits=, dim=)``: the quantized weight, with a gradient for training."""
    codes: Callable[..., tuple[Tensor, Tensor]]
    """With the same arguments: int8 codes [O, I] and scales ([] or [O]). Their product is ``value``, bit for bit."""
    state: Literal["scale", "curvature"] | None = None
    """A further tensor argument of ``value``: a learned ``scale`` ([] or [O]) or a ``curvature`` of shape [O, I]."""
    start: Callable[..., Tensor] | None = None
    """``start(weight, bits=, dim=, search=)``: the initial value of a learned scale."""


def positive(scale: Tensor) -> Tensor:
    """Clamp a learned scale to 1e-6 or more. The gradient still passes, so a scale below can grow again."""
    return torch.where(scale > fq.SCALE_MIN, scale, fq.SCALE_MIN + (scale - scale.detach()))


def _start_gamma(weight: Tensor, *, bits: int, dim: int | None, search: bool) -> Tensor:
    return fq.search_gamma(weight, bits=bits, dim=dim) if search else torch.ones_like(_mean_size(weight, dim))


def _start_alpha(weight: Tensor, *, bits: int, dim: int | None, search: bool) -> Tensor:
    return _start_gamma(weight, bits=bits, dim=dim, search=search) * _mean_size(weight, dim)


def _start_step(weight: Tensor, *, bits: int, dim: int | None, search: bool) -> Tensor:
    if not search:
        return fq.lsq_init(weight, bits=bits, dim=dim)
    return _start_alpha(weight, bits=bits, dim=dim, search=True) / fq.levels(bits)


def _mean_size(weight: Tensor, dim: int | None) -> Tensor:
    return weight.abs().mean() if dim is None else weight.abs().mean(dim=1 - dim)


def _twn(weight: Tensor, *, bits: int, dim: int | None) -> Tensor:
    return fq.twn(weight, dim=dim)


def _twn_codes(weight: Tensor, *, bits: int, dim: int | None) -> tuple[Tensor, Tensor]:
    return fq.twn_codes(weight, dim=dim)


DYNAMIC_SCALING = Method(fq.dynamic_scaling, fq.dynamic_scaling_codes, "scale", _start_gamma)
PACT = Method(fq.pact, fq.pact_codes, "scale", _start_alpha)
LSQ = Method(fq.lsq, fq.lsq_codes, "scale", _start_step)
LAQ = Method(fq.laq, fq.laq_codes, "curvature")
TWN = Method(_twn, _twn_codes)
ROUND_TO_NEAREST = Method(fq.round_to_nearest, fq.round_to_nearest_codes)


def method_of(name: str, *, norm_gradient: bool = False, block: int | None = None) -> Method:
    """Return the method with this name. With ``block``, it has one scale per row and block of inputs.

    ``norm_gradient`` (dynamic scaling only) lets the gradient pass through the norm of the weights. Raises RecipeError
    for a name that is not registered, and lists the registered ones.
    """
    method: Method = QUANTIZERS.get(name)
    if norm_gradient:
        method = replace(method, value=partial(method.value, norm_gradient=True))
    if block is None:
        return method
    return replace(
        method,
        value=partial(by_block, method.value, block=block),
        codes=partial(codes_by_block, method.codes, block=block),
        start=method.start and partial(by_block, method.start, block=block),
    )
