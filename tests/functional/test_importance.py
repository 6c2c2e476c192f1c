"""The importance scores against what removing a unit really does."""

import pytest
import torch

from compress.functional.importance import loss_aware, magnitude, movement


def test_magnitude() -> None:
    units = torch.tensor([[[3.0, 0.0], [0.0, 4.0]], [[0.0, 0.0], [0.0, 0.0]]])
    assert magnitude(units).tolist() == [5.0, 0.0]


def test_loss_aware_estimates_what_removing_a_unit_costs() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = 1e-3 * torch.randn(4, 6, generator=generator, dtype=torch.float64)
    x = torch.randn(6, generator=generator, dtype=torch.float64)

    def loss(mask: torch.Tensor) -> torch.Tensor:
        return (mask * (weight @ x)).exp().sum()

    mask = torch.ones(4, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(loss(mask), mask)
    removed = [(loss(mask) - loss(mask - torch.eye(4)[u])).abs().item() for u in range(4)]
    assert loss_aware(mask, grad).tolist() == pytest.approx(removed, rel=0.02)
    assert loss_aware(torch.zeros(4), torch.ones(4)).tolist() == [0, 0, 0, 0]


def test_movement_is_positive_where_weights_grow() -> None:
    weight = torch.tensor([[1.0, -2.0], [1.0, -2.0], [1.0, 1.0]])
    grad = torch.tensor([[-0.1, 0.1], [0.1, -0.1], [0.1, -0.1]])  # a descent step grows, shrinks, and shifts
    torch.testing.assert_close(movement(weight, grad), torch.tensor([0.3, -0.3, 0.0]))
    step = weight - 0.01 * grad
    assert ((magnitude(step) - magnitude(weight))[:2].sign() == movement(weight, grad)[:2].sign()).all()
