"""The weight quantizers that a recipe can name, brought to one form: start a scale, quantize, give codes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from compress.functional import fake_quant as fq
from compress.functional.blocks import by_block, codes_by_block
from compress.surgery.quantization.spec import MethodName


@dataclass(frozen=True)
class Method:
    """A quantizer: ``value`` and ``codes`` take the weight, what ``state`` names (if anything), ``bits`` and ``dim``.

    ``scale`` is a learned parameter, [], one a row or one a block, whose first value ``start`` gives; ``curvature`` is
    a diagonal curvature shaped like the weight.
    """

    value: Callable[..., Tensor]
    codes: Callable[..., tuple[Tensor, Tensor]]
    state: Literal["scale", "curvature"] | None = None
    start: Callable[..., Tensor] | None = None


def positive(scale: Tensor) -> Tensor:
    """Hold a learned scale at 1e-6 or more; the gradient passes, so that one which fell below can come back."""
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


METHODS: dict[MethodName, Method] = {
    "dynamic_scaling": Method(fq.dynamic_scaling, fq.dynamic_scaling_codes, "scale", _start_gamma),
    "pact": Method(fq.pact, fq.pact_codes, "scale", _start_alpha),
    "lsq": Method(fq.lsq, fq.lsq_codes, "scale", _start_step),
    "laq": Method(fq.laq, fq.laq_codes, "curvature"),
    "twn": Method(_twn, _twn_codes),
    "round_to_nearest": Method(fq.round_to_nearest, fq.round_to_nearest_codes),
}


def method_of(name: MethodName, *, norm_gradient: bool = False, block: int | None = None) -> Method:
    """A method by its name, with one scale a row and ``block`` of inputs if that is given.

    ``norm_gradient`` (of dynamic scaling alone) lets the weights' norm carry gradient.
    """
    method = METHODS[name]
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
