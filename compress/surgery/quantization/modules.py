"""The modules that replace linear layers and embeddings. A weight is always held as [O, I].

:class:`Product` and :class:`Table` do the computing. Training and deployment differ only in the weight module, which is
:class:`FakeQuantWeight` or :class:`StoredWeight`, so both run the same float32 arithmetic. Tied modules share one
weight module. Shapes: O outputs (or vocabulary), I inputs (or hidden size).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.distributed import collectives
from compress.functional import fake_quant as fq
from compress.surgery.quantization.methods import method_of, positive
from compress.surgery.quantization.spec import MatrixSpec

SQUARES_DECAY, SQUARES_FLOOR = 0.999, 1e-8
"""The decay of the running mean of squared gradients, and the value added to its root, as in Adam."""


class FakeQuantWeight(nn.Module):
    """A float32 master weight [O, I] with the learned state of its quantizer. Calling it gives the quantized weight.

    In training, each weight is quantized with probability ``noise_p`` (Quant-Noise) and passed unchanged otherwise.
    """

    squares: Tensor

    def __init__(
        self,
        weight: Tensor,
        spec: MatrixSpec,
        *,
        search: bool = True,
        noise_p: float = 1.0,
        norm_gradient: bool = False,
    ) -> None:
        super().__init__()
        self.spec, self.noise_p = spec, noise_p
        self.weight = nn.Parameter(weight.detach().float().clone(memory_format=torch.contiguous_format))
        self.method = method_of(spec.method, norm_gradient=norm_gradient, block=spec.group)
        if self.method.start is not None:
            start = self.method.start(self.weight.detach(), bits=spec.bits, dim=spec.dim, search=search)
            self.scale = nn.Parameter(start)
        elif self.method.state == "curvature":
            self.register_buffer("squares", torch.zeros_like(self.weight))
        self._table: Tensor | None = None
        self._product: Tensor | None = None

    def forward(self) -> Tensor:
        """Return the quantized weight [O, I] for a linear layer, in float32 or the dtype chosen by :func:`prepared`."""
        return self._quantized() if self._product is None else self._product

    def rows(self, ids: Tensor, padding_idx: int | None) -> Tensor:
        """Return the rows ``ids`` of the weight, float32, [...] -> [..., I]; quantize only these if none is held."""
        if self._table is not None or self.spec.dim is None:
            return F.embedding(ids, self._quantized() if self._table is None else self._table, padding_idx)
        parts = [F.embedding(ids.flatten(), part.reshape(len(part), -1), padding_idx) for part in self._operands()]
        return self._value(*parts).view(*ids.shape, -1)

    @torch.no_grad()
    def codes(self) -> tuple[Tensor, Tensor]:
        """What deployment stores: int8 codes [O, I] and scales. Their product is the quantized weight."""
        return self.method.codes(*self._operands(), bits=self.spec.bits, dim=self.spec.dim)

    def hold(self, dtype: torch.dtype | None) -> None:
        """Quantize now and keep the result until :meth:`release`. Linear layers get it in ``dtype``."""
        self._table = self._quantized()
        self._product = self._table if dtype is None else self._table.to(dtype)

    def release(self) -> None:
        """Discard the result of :meth:`hold`."""
        self._table = self._product = None

    def _operands(self) -> list[Tensor]:
        if self.method.state == "scale":
            return [self.weight, positive(self.scale)]
        if self.method.state == "curvature":
            return [self.weight, self.squares.sqrt() + SQUARES_FLOOR]
        return [self.weight]

    def _quantized(self) -> Tensor:
        quantized = self._value(*self._operands())
        if self.method.state == "curvature" and quantized.requires_grad:
            quantized.register_hook(self._observe)
        return quantized

    def _value(self, weight: Tensor, *state: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            quantized = self.method.value(weight, *state, bits=self.spec.bits, dim=self.spec.dim)
            return fq.noise(weight, quantized, p=self.noise_p) if self.training and self.noise_p < 1 else quantized

    def _observe(self, gradient: Tensor) -> None:
        self.squares.lerp_(collectives.mean(gradient.detach()).square(), 1 - SQUARES_DECAY)


class StoredWeight(nn.Module):
    """A dequantized weight [O, I] that does not train, with the packed codes and scales that it was made of.

    Codes and scales stay as they were read, on the CPU, so that the model can be saved again bit for bit.
    """

    def __init__(self, weight: Tensor, codes: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.codes, self.scale = codes, scale

    def forward(self) -> Tensor:
        """Return the weight [O, I]."""
        return self.weight

    def rows(self, ids: Tensor, padding_idx: int | None) -> Tensor:
        """Return the rows ``ids`` of the weight, [...] -> [..., I]."""
        return F.embedding(ids, self.weight, padding_idx)


class Product(nn.Module):
    """Replaces a linear layer: y = quantized(x) quantized(W)^T + b, [..., I] -> [..., O]."""

    def __init__(self, quantizer: FakeQuantWeight | StoredWeight, bias: nn.Parameter | None, spec: MatrixSpec) -> None:
        super().__init__()
        self.quantizer, self.spec, self.bias = quantizer, spec, bias

    @property
    def weight(self) -> Tensor:
        """The master (or stored) weight [O, I]."""
        return self.quantizer.weight

    def forward(self, x: Tensor) -> Tensor:
        """Quantize the input, then multiply."""
        return F.linear(self.activations(x), self.quantizer(), self.bias)

    def activations(self, x: Tensor) -> Tensor:
        """Return the input of the matrix product, quantized if configured: [..., I] -> [..., I]."""
        spec = self.spec
        with torch.autocast(x.device.type, enabled=False):
            if spec.activations == "block":
                return fq.activation_block(x.float(), block=spec.block)
            if spec.activations == "symmetric":
                return fq.activation_symmetric(x.float(), clip=spec.clip)
            if spec.activations == "asymmetric":
                return fq.activation_asymmetric(x.float(), clip=spec.clip)
        return x


class Table(nn.Module):
    """Replaces a token embedding: rows of a quantized weight times ``scale``, [...] -> [..., I]."""

    def __init__(
        self, quantizer: FakeQuantWeight | StoredWeight, padding_idx: int | None, scale: float, spec: MatrixSpec
    ) -> None:
        super().__init__()
        self.quantizer, self.padding_idx, self.scale, self.spec = quantizer, padding_idx, scale, spec

    @property
    def weight(self) -> Tensor:
        """The master (or stored) weight [O, I]."""
        return self.quantizer.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Look up the rows of ``ids``."""
        return self.quantizer.rows(ids, self.padding_idx) * self.scale


def fake_quantized(model: nn.Module) -> list[FakeQuantWeight]:
    """Return the fake-quantized weights of a model, shared ones once."""
    return [module for module in model.modules() if isinstance(module, FakeQuantWeight)]


def stored(model: nn.Module) -> list[StoredWeight]:
    """Return the weights of a model that was restored from packed codes, shared ones once."""
    return [module for module in model.modules() if isinstance(module, StoredWeight)]


def quantizer_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the learned scales of the quantizers. They have their own learning rate."""
    return [weight.scale for weight in fake_quantized(model) if weight.method.state == "scale"]


def weights_and_scales(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the parameters of a model, apart from the scales that its quantizers learn, and these scales."""
    scales = quantizer_parameters(model)
    learned = {id(scale) for scale in scales}
    return [each for each in model.parameters() if id(each) not in learned], scales


def operands(product: nn.Module) -> list[Tensor]:
    """Return the tensors a linear layer computes with: its parameters, or the held fake-quantized weight and bias."""
    if not isinstance(product, Product):
        return list(product.parameters())
    return [product.quantizer()] + ([] if product.bias is None else [product.bias])


@contextmanager
def prepared(model: nn.Module, dtype: torch.dtype | None = None) -> Iterator[None]:
    """Quantize every weight of ``model`` once. All uses inside the block share the result and its graph.

    The block must contain a forward pass *and its backward pass*, because checkpointed parts recompute in the backward
    pass and must find the same tensors. It may also contain a whole evaluation. ``dtype`` is the dtype of matrix
    products under autocast. Weights must not change inside the block. Nothing happens to a model without fake-quantized
    weights.
    """
    weights = fake_quantized(model)
    try:
        for weight in weights:
            weight.hold(dtype)
        yield
    finally:
        for weight in weights:
            weight.release()
