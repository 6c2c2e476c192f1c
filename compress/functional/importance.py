"""Importance scores of prunable units: attention heads, FFN neurons and hidden dimensions.

Every function returns one score per unit; units with higher scores are kept. The caller sums over batches.
"""

import torch
from torch import Tensor


def magnitude(units: Tensor) -> Tensor:
    """Return ||w_u||_2 for each unit u: weights [U, ...] -> [U].

    Li et al., "Pruning Filters for Efficient ConvNets" (arXiv 1608.08710), with the L2 norm. A unit of zeros scores 0.
    """
    scores: Tensor = torch.linalg.vector_norm(units.reshape(len(units), -1), dim=-1)
    return scores


def loss_aware(mask: Tensor, grad: Tensor) -> Tensor:
    """Return |m_u dL/dm_u| for each unit u: mask [U] and its gradient [U] -> [U]; at m = 1, |dL/dm| of Michel et al.

    The first-order (Taylor) estimate of the change of the loss when the unit is removed: Molchanov et al. (arXiv
    1611.06440, equation 6), Michel et al. (arXiv 1905.10650, equation 2). The caller sums these absolute values over
    batches.
    """
    return (mask * grad).abs()


def movement(weight: Tensor, grad: Tensor) -> Tensor:
    """Return -sum_{w in u} w dL/dw for each unit u: weights [U, ...] and their gradients [U, ...] -> [U], signed.

    Sanh et al., "Movement Pruning" (arXiv 2005.07683, equation 4), summed over a unit; accumulate it over
    training steps. Positive where the weights move away from zero.
    """
    return -(weight * grad).reshape(len(weight), -1).sum(-1)
