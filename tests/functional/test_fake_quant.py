"""Golden values, laws and gradients of the fake quantizers."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from compress.functional import fake_quant as fq

law = settings(max_examples=40, deadline=None, derandomize=True)
bits_and_dim = pytest.mark.parametrize(("bits", "dim"), [(b, dim) for b in (2, 3, 4, 8) for dim in (None, 0, 1, -1)])

W = torch.tensor([-1.2, -0.4, -0.1, 0, 0.25, 0.5, 0.9, 2.0], dtype=torch.float64)
G = torch.tensor([1, -2, 0.5, 3, -1, 2, -0.5, 1], dtype=torch.float64)
ONE = torch.tensor(1.0, dtype=torch.float64)
A = 0.66875  # gamma = 1


def clip_of(weight: Tensor, dim: int | None) -> Tensor:
    """A clip value a group somewhere inside the weights."""
    groups = weight.reshape(1, -1) if dim is None else weight.movedim(dim, 0).flatten(1)
    clip = 1.7 * groups.abs().mean(-1)
    return clip.reshape(()) if dim is None else clip


def methods(
    weight: Tensor, bits: int, dim: int | None
) -> dict[str, tuple[Callable[..., Tensor], Callable[..., tuple[Tensor, Tensor]]]]:
    """Every weight quantizer with its codes form, given a plausible parameter."""
    curvature = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1), dtype=weight.dtype)
    clip = clip_of(weight, dim)
    gamma, step = torch.full_like(clip, 1.7), clip / fq.levels(bits)
    forms: dict[str, tuple[Callable[..., Tensor], Callable[..., tuple[Tensor, Tensor]]]] = {
        "dynamic_scaling": (
            partial(fq.dynamic_scaling, gamma=gamma, bits=bits, dim=dim),
            partial(fq.dynamic_scaling_codes, gamma=gamma, bits=bits, dim=dim),
        ),
        "pact": (
            partial(fq.pact, alpha=clip, bits=bits, dim=dim),
            partial(fq.pact_codes, alpha=clip, bits=bits, dim=dim),
        ),
        "lsq": (partial(fq.lsq, step=step, bits=bits, dim=dim), partial(fq.lsq_codes, step=step, bits=bits, dim=dim)),
        "laq": (
            partial(fq.laq, curvature=curvature, bits=bits, dim=dim),
            partial(fq.laq_codes, curvature=curvature, bits=bits, dim=dim),
        ),
        "round_to_nearest": (
            partial(fq.round_to_nearest, bits=bits, dim=dim),
            partial(fq.round_to_nearest_codes, bits=bits, dim=dim),
        ),
    }
    if bits == 2:
        forms["twn"] = partial(fq.twn, dim=dim), partial(fq.twn_codes, dim=dim)
    return forms


@pytest.mark.parametrize(
    ("bits", "expected", "gradient"),
    [
        (2, [-A, -A, 0, 0, 0, A, A, A], 0.840625),
        (3, [-A, -0.445833, 0, 0, 0.222917, 0.445833, A, A], -0.273958333),
        (4, [-A, -0.382143, -0.095536, 0, 0.286607, 0.477679, A, A], -0.449107143),
    ],
)
def test_dynamic_scaling_golden(bits: int, expected: list[float], gradient: float) -> None:
    weight, gamma = W.clone().requires_grad_(), ONE.clone().requires_grad_()
    value = fq.dynamic_scaling(weight, gamma, bits=bits)
    value.backward(G)
    torch.testing.assert_close(value.detach(), torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0)
    assert gamma.grad is not None and gamma.grad.item() == pytest.approx(gradient, abs=1e-9)
    assert weight.grad is not None and weight.grad.tolist() == [0, -2, 0.5, 3, -1, 2, 0, 0]


def test_dynamic_scaling_golden_with_the_norm_in_the_graph() -> None:
    weight, gamma = W.clone().requires_grad_(), ONE.clone().requires_grad_()
    fq.dynamic_scaling(weight, gamma, bits=2, norm_gradient=True).backward(G)
    expected = [-0.157126, -2.157126, 0.342874, 3, -0.842874, 2.157126, 0.157126, 0.157126]
    assert weight.grad is not None and weight.grad.tolist() == pytest.approx(expected, abs=1e-6)
    assert gamma.grad is not None and gamma.grad.item() == pytest.approx(0.840625, abs=1e-9)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_pact_golden(bits: int) -> None:
    weight, alpha = W.clone().requires_grad_(), torch.tensor(A, dtype=torch.float64, requires_grad=True)
    value = fq.pact(weight, alpha, bits=bits)
    value.backward(G)
    assert torch.equal(value, fq.dynamic_scaling(W, ONE, bits=bits))
    # the table states the gradient by gamma: dL/dgamma = mean|w| dL/dalpha
    assert alpha.grad is not None and alpha.grad.item() * A == pytest.approx(-0.334375, abs=1e-12)
    assert weight.grad is not None and weight.grad.tolist() == [0, -2, 0.5, 3, -1, 2, 0, 0]


def test_twn_golden() -> None:
    codes, scale = fq.twn_codes(W)
    assert scale.item() == pytest.approx(1.15)
    assert codes.tolist() == [-1, 0, 0, 0, 0, 1, 1, 1]
    torch.testing.assert_close(fq.twn(W), 1.15 * codes.double())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_lsq_gradient(bits: int) -> None:
    n, weight = fq.levels(bits), W.clone().requires_grad_()
    step = torch.tensor(0.3 / n, dtype=torch.float64, requires_grad=True)
    value = fq.lsq(weight, step, bits=bits)
    value.backward(G)
    ratio = W / step.detach()
    torch.testing.assert_close(value.detach(), ratio.clamp(-n, n).round() * step.detach())
    vote = torch.where(ratio.abs() >= n, n * W.sign(), ratio.round() - ratio)
    assert step.grad is not None
    torch.testing.assert_close(step.grad, (G * vote).sum() / (8 * n) ** 0.5)
    assert fq.lsq_init(W, bits=bits).item() == pytest.approx(2 * A / n**0.5)


@bits_and_dim
@pytest.mark.parametrize("norm_gradient", [False, True])
def test_gradients_are_autograd_through_a_straight_through_round(
    bits: int, dim: int | None, norm_gradient: bool
) -> None:
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    upstream = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    groups = 1 if dim is None else weight.shape[dim]
    gamma = (1 + torch.rand(groups, generator=generator, dtype=torch.float64)).requires_grad_()
    weight.requires_grad_()
    quantized = fq.dynamic_scaling(weight, gamma, bits=bits, dim=dim, norm_gradient=norm_gradient)
    gradients = torch.autograd.grad(quantized, (weight, gamma), upstream)

    n, shape = fq.levels(bits), [1, 1]
    if dim is not None:
        shape[dim] = groups
    reduced = [0, 1] if dim is None else [1 - dim % 2]
    counted = weight if norm_gradient else weight.detach()
    alpha = gamma.view(shape) * counted.abs().mean(reduced, keepdim=True)
    scaled = torch.maximum(torch.minimum(weight, alpha), -alpha) / alpha * n
    reference = alpha * (scaled + (scaled.round() - scaled).detach()) / n
    torch.testing.assert_close(quantized, reference)
    torch.testing.assert_close(gradients, torch.autograd.grad(reference, (weight, gamma), upstream))


@bits_and_dim
@law
@given(seed=st.integers(0, 2**31), spread=st.sampled_from([1e-4, 0.02, 3.0]))
def test_codes_times_scale_is_the_quantized_weight_bit_for_bit(
    bits: int, dim: int | None, seed: int, spread: float
) -> None:
    weight = spread * torch.randn(3, 5, generator=torch.Generator().manual_seed(seed))
    weight[1] = 0
    for value, codes_and_scale in methods(weight, bits, dim).values():
        codes, scale = codes_and_scale(weight)
        assert codes.dtype == torch.int8 and codes.abs().max() <= fq.levels(bits)
        assert scale.shape == (() if dim is None else (weight.shape[dim],))
        restored = fq.dequantize(codes, scale, dim=dim)
        assert torch.equal(restored.view(torch.int32), value(weight).view(torch.int32))
        assert (restored[1] == 0).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_groups_are_quantized_each_on_its_own(bits: int, dim: int) -> None:
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    for index in range(weight.shape[dim]):
        row = weight.select(dim, index)
        for name in ("round_to_nearest", *(["twn"] if bits == 2 else [])):
            whole, alone = methods(weight, bits, dim)[name][0](weight), methods(row, bits, None)[name][0](row)
            torch.testing.assert_close(whole.select(dim, index), alone)
        gamma = torch.full((weight.shape[dim],), 1.3)
        whole = fq.dynamic_scaling(weight, gamma, bits=bits, dim=dim)
        torch.testing.assert_close(whole.select(dim, index), fq.dynamic_scaling(row, gamma[0], bits=bits))


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("dim", [None, 0])
def test_zeros_quantize_to_zero_with_finite_gradients(bits: int, dim: int | None) -> None:
    weight = torch.zeros(2, 3, requires_grad=True)
    for value, _ in methods(weight.detach(), bits, dim).values():
        quantized = value(weight)
        (gradient,) = torch.autograd.grad(quantized.sum(), weight)
        assert torch.equal(quantized, torch.zeros(2, 3)) and gradient.isfinite().all()
    gamma = torch.ones(() if dim is None else 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(fq.dynamic_scaling(weight, gamma, bits=bits, dim=dim).sum(), gamma)
    assert torch.equal(gradient, torch.zeros_like(gamma))


def test_a_clip_value_below_zero_quantizes_to_zero_and_can_recover() -> None:
    alpha = torch.tensor(-0.1, dtype=torch.float64, requires_grad=True)
    value = fq.pact(W, alpha, bits=4)
    (gradient,) = torch.autograd.grad((value - W).square().sum(), alpha)
    assert (value == 0).all() and gradient < 0  # a step down the gradient raises alpha
    assert fq.pact_codes(W, alpha, bits=4)[1] == 0
    gamma = torch.tensor(-3.0, dtype=torch.float64)
    assert torch.equal(
        fq.dynamic_scaling(W, gamma, bits=4), fq.dynamic_scaling(W, torch.tensor(fq.SCALE_MIN).double(), bits=4)
    )


def test_straight_through_gradients() -> None:
    for name, (value, _) in methods(W, 2, None).items():
        weight = W.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(value(weight), weight, G)
        inside = W.abs() < 1.7 * A if name in ("dynamic_scaling", "pact", "lsq") else torch.ones(8, dtype=torch.bool)
        assert torch.equal(gradient, G * inside), name


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dim", [None, 0, 1])
@pytest.mark.parametrize("seed", [0, 4, 6])  # rows whose best clip value at 8 bits lies 2 to 3 % beyond max |w|
def test_search_gamma_finds_the_best_clip_value(bits: int, dim: int | None, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(4, 300, generator=generator, dtype=torch.float64)
    weight = weight if dim != 1 else weight.T.contiguous()
    weight[(0, 0)] = 9.0  # an outlier
    gamma = fq.search_gamma(weight, bits=bits, dim=dim)

    def error(gamma: Tensor) -> Tensor:
        squared = (fq.dynamic_scaling(weight, gamma, bits=bits, dim=dim) - weight).square()
        return squared.sum() if dim is None else squared.sum(1 - dim)

    dense = torch.stack([error(torch.full_like(gamma, g)) for g in torch.linspace(0.5, 12, 600).tolist()]).amin(0)
    assert gamma.shape == (() if dim is None else (weight.shape[dim],))
    assert (error(gamma) <= 1.01 * dense).all()
    assert (error(gamma) <= error(torch.ones_like(gamma))).all()


def test_search_gamma_in_blocks_and_on_degenerate_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(7, 20, generator=torch.Generator().manual_seed(0))
    weight[0], weight[1], weight[2] = 0, 0.3, torch.eye(20)[0]
    whole = fq.search_gamma(weight, bits=2, dim=0)
    monkeypatch.setattr(fq, "_BLOCK_ELEMENTS", 50)
    assert torch.equal(fq.search_gamma(weight, bits=2, dim=0), whole)
    torch.testing.assert_close(whole[:3], torch.tensor([1.0, 1.0, 20.0]))
    torch.testing.assert_close(fq.dynamic_scaling(weight, whole, bits=2, dim=0)[:3], weight[:3])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_laq_weighs_the_error_by_the_curvature(bits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(200, generator=generator, dtype=torch.float64)
    curvature = torch.rand(200, generator=generator, dtype=torch.float64) ** 4

    def error(quantized: Tensor) -> float:
        return float((curvature * (quantized - weight).square()).sum())

    errors = [error(fq.laq(weight, curvature, bits=bits, iterations=i)) for i in range(12)]
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(errors))
    assert errors[-1] < error(fq.laq(weight, torch.ones_like(weight), bits=bits))
    codes, scale = fq.laq_codes(weight, curvature, bits=bits, iterations=50)  # at the fixed point, the closed form
    closed = (curvature * codes * weight).sum() / (curvature * codes * codes).sum()
    torch.testing.assert_close(scale, closed)
    flat = fq.laq(weight, torch.zeros_like(weight), bits=bits)  # no curvature yet: the clip value stays where it starts
    assert torch.equal(flat, fq.laq(weight, curvature, bits=bits, iterations=0))


def test_laq_of_weights_of_one_size_is_exact() -> None:
    weight = torch.tensor([0.3, -0.3, 0.3])
    torch.testing.assert_close(fq.laq(weight, torch.ones(3), bits=2), weight)


def test_noise_mixes_the_two() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(200, 50, generator=generator, requires_grad=True)
    gamma = torch.tensor(1.0, requires_grad=True)
    quantized = fq.dynamic_scaling(weight, gamma, bits=2)
    assert torch.equal(fq.noise(weight, quantized, p=1.0), quantized)
    assert torch.equal(fq.noise(weight, quantized, p=0.0), weight)
    mixed = fq.noise(weight, quantized, p=0.3, generator=generator)
    chosen = mixed == quantized
    assert torch.equal(mixed, torch.where(chosen, quantized, weight))
    assert chosen.float().mean().item() == pytest.approx(0.3, abs=0.02)
    (gradient,) = torch.autograd.grad(mixed.sum(), weight)
    inside = weight.detach().abs() < weight.detach().abs().mean()
    assert torch.equal(gradient, (~chosen | inside).float())
    with pytest.raises(ValueError, match="p must"):
        fq.noise(weight, quantized, p=1.5)


@law
@given(
    seed=st.integers(0, 2**31), size=st.integers(1, 70), block=st.sampled_from([1, 16, 32]), spread=st.floats(1e-3, 1e3)
)
def test_activation_block(seed: int, size: int, block: int, spread: float) -> None:
    x = (spread * torch.randn(2, 3, size, generator=torch.Generator().manual_seed(seed))).requires_grad_()
    quantized = fq.activation_block(x, block=block)
    for start in range(0, size, block):
        part, seen = (
            x.detach()[..., start : start + block].double(),
            quantized.detach()[..., start : start + block].double(),
        )
        scale = part.abs().amax(-1, keepdim=True) / 127
        codes = seen / scale
        torch.testing.assert_close(codes, codes.round(), atol=2e-4, rtol=0)
        assert (codes.abs() <= 127.001).all() and ((seen - part).abs() <= 0.50002 * scale).all()
    upstream = torch.rand_like(x)
    (gradient,) = torch.autograd.grad(quantized, x, upstream)
    assert torch.equal(gradient, upstream)


class Copies(TorchDispatchMode):
    """Names the operators that only copy a tensor of this many numbers."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.seen = size, list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("clone", "copy_", "_to_copy", "constant_pad_nd"):
            self.seen += [str(func)] if out.numel() >= self.size else []
        return out


@pytest.mark.parametrize("quantize", [partial(fq.activation_block, block=8), fq.activation_asymmetric])
def test_quantizing_float32_activations_copies_none_of_them(quantize: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(3, 16, requires_grad=True)
    with Copies(x.numel()) as copies:
        quantized = quantize(x)
    quantized.sum().backward()
    assert copies.seen == []
    assert x.grad is not None and torch.equal(x.grad, torch.ones_like(x))


def test_activation_block_golden_and_edges() -> None:
    x = torch.tensor([127.0, 0.5, 1.5, -2.5, 0, 0, 0, 0, 254.0, 3.0])  # ties to even, a block of zeros, a short block
    expected = torch.tensor([127.0, 0, 2, -2, 0, 0, 0, 0, 254, 4])
    assert torch.equal(fq.activation_block(x, block=4), expected)
    assert torch.equal(fq.activation_block(x[None, None], block=4), expected[None, None])
    half = fq.activation_block(x.bfloat16(), block=4)
    assert half.dtype == torch.bfloat16 and torch.equal(half, expected.bfloat16())
    with pytest.raises(ValueError, match="block"):
        fq.activation_block(x, block=0)


@law
@given(seed=st.integers(0, 2**31), bits=st.sampled_from([2, 4, 8]), offset=st.floats(-3, 3))
def test_layer_wise_activations(seed: int, bits: int, offset: float) -> None:
    x = torch.randn(4, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + offset
    s = fq.levels(bits) / x.abs().max()
    torch.testing.assert_close(fq.activation_symmetric(x, bits=bits), (x * s).round() / s)
    quantized = fq.activation_asymmetric(x, bits=bits)
    width = (x.max() - x.min()) / (2**bits - 1)
    assert (quantized - x).abs().max() <= width / 2 + 1e-7
    assert quantized.min() == x.min() and len(quantized.unique()) <= 2**bits
    torch.testing.assert_close(quantized.max(), x.max(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("activation", [fq.activation_symmetric, fq.activation_asymmetric])
def test_layer_wise_activations_clip_on_request_only(activation: Callable[..., Tensor]) -> None:
    x = torch.tensor([-9.0, -1.0, 0.3, 2.4, 7.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(activation(x).sum(), x)
    assert torch.equal(gradient, torch.ones(5)) and activation(x).abs().max() > 6.9
    clipped = activation(x, clip=2.5)
    (gradient,) = torch.autograd.grad(clipped.sum(), x)
    assert gradient.tolist() == [0, 1, 1, 1, 0] and clipped.abs().max() <= 2.5 + 1e-6
    constant = torch.full((3,), 0.7)
    torch.testing.assert_close(activation(constant), constant)
    assert torch.equal(activation(torch.zeros(3)), torch.zeros(3))


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="bits"):
        fq.round_to_nearest(W, bits=1)
    with pytest.raises(ValueError, match="bits"):
        fq.dynamic_scaling(W, ONE, bits=9)
    with pytest.raises(ValueError, match="needs 2 value"):
        fq.dynamic_scaling(torch.ones(2, 3), torch.ones(3), bits=2, dim=0)
    with pytest.raises(ValueError, match="needs 1 value"):
        fq.pact(torch.ones(2, 3), torch.ones(3), bits=2)
