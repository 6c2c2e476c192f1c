"""Gather the weights of each unit (head, FFN neuron, hidden dimension) of a prunable dimension (axis), for scoring."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from compress.models.structure import Axis, sides


def unit_weights(model: nn.Module, axis: Axis) -> Tensor:
    """Return all weights of each unit of ``axis``: [units, weights per unit]. Shared parameters count once."""
    distinct = {id(side.parameter): side for side in sides(model, [axis])}
    columns = []
    for side in distinct.values():
        split = side.parameter.detach().movedim(side.dim, 0).unflatten(0, (side.slot.blocks, -1, side.slot.width))
        columns.append(split.movedim(1, 0).flatten(1))
    return torch.cat(columns, dim=1)
