"""Chunk by chunk, the same sums and gradients as all at once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.functional.chunked import chunked_means


def _problem(tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(tokens, 5, generator=generator, dtype=torch.float64)
    weight, bias = (torch.randn(*size, generator=generator, dtype=torch.float64) for size in ((7, 5), (7,)))
    labels = torch.randint(7, (tokens,), generator=generator)
    return [tensor.requires_grad_() for tensor in (states, weight, bias)], labels


def _losses(logits, labels):
    return torch.stack([F.cross_entropy(logits, labels, reduction="sum"), logits.square().mean(-1).sum()])


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(1, 12), size=st.integers(1, 14), seed=st.integers(0, 99), upstream=st.sampled_from([1.0, 0.3])
)
def test_value_and_gradients_equal_the_whole(tokens, size, seed, upstream):
    (states, weight, bias), labels = _problem(tokens, seed)
    weights = torch.tensor([0.5, 2.0], dtype=torch.float64)

    def sums(rows, chunk):
        return _losses(F.linear(chunk, weight, bias), labels[rows])

    # the head's weight comes out of a graph, as a quantized one does
    total, means = chunked_means(sums, size, weights, states * 1.0, [weight, bias])
    got = torch.autograd.grad(total * upstream, (states, weight, bias))
    whole = _losses(F.linear(states, weight, bias), labels) / tokens
    expected = torch.autograd.grad(whole @ weights * upstream, (states, weight, bias))
    torch.testing.assert_close(means, whole.detach())
    torch.testing.assert_close(got, expected)
    assert not means.requires_grad


@pytest.mark.parametrize("size", [1, 16, 256])
def test_a_bf16_head_gets_its_gradient_as_exactly_in_small_chunks_as_in_one(size):
    """The head as ``prepared`` holds it under autocast; sums over chunks must not be rounded chunk by chunk."""
    generator = torch.Generator().manual_seed(0)
    states, shift = torch.randn(256, 16, generator=generator), torch.randn(16, generator=generator)
    states, head = (states + shift).bfloat16(), torch.randn(64, 16, generator=generator).bfloat16()
    labels = torch.randint(4, (256,), generator=generator)

    def gradient(dtype, size):
        leaf, wide = head.to(dtype).requires_grad_(), torch.promote_types(dtype, torch.float32)
        weights = torch.ones(2, dtype=wide)

        def sums(rows, chunk):
            return _losses(F.linear(chunk, leaf).to(wide), labels[rows])

        total, _ = chunked_means(sums, size, weights, states.to(dtype), [leaf])
        (found,) = torch.autograd.grad(total, [leaf])
        assert found.dtype == dtype
        return found.double()

    exact = gradient(torch.float64, 256)
    assert (gradient(torch.bfloat16, size) - exact).norm() < 2**-7 * exact.norm()


def test_a_second_backward_pass_is_refused():
    (states, weight, bias), labels = _problem(6, 0)
    total, _ = chunked_means(
        lambda rows, chunk: _losses(F.linear(chunk, weight, bias), labels[rows]), 4,
        torch.ones(2, dtype=torch.float64), states * 1.0, [weight, bias],
    )  # fmt: skip
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second time"):
        total.backward()


def test_gradient_stops_where_none_is_wanted():
    (states, weight, bias), labels = _problem(6, 0)
    frozen = weight.detach()
    total, _ = chunked_means(
        lambda rows, chunk: _losses(F.linear(chunk, frozen, bias), labels[rows]), 4,
        torch.ones(2, dtype=torch.float64), states.detach(), [frozen, bias],
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(total, [bias])
    assert gradient.abs().sum() > 0
    with torch.no_grad():
        assert not chunked_means(lambda rows, chunk: chunk.sum(0)[:2], 4, torch.ones(2).double(), states, [])[
            0
        ].requires_grad


def test_no_tokens_give_zero():
    (states, weight, bias), _ = _problem(1, 0)
    total, means = chunked_means(
        lambda rows, chunk: pytest.fail("nothing to see"), 4, torch.ones(2).double(), states[:0], [weight, bias]
    )
    assert total == 0 and (means == 0).all()
