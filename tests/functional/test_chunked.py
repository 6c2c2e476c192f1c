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
