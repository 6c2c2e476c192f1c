"""Remove whole layers from a model."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from compress.engine.models import ancestry_of, checked, remember_layers
from compress.errors import ModelError, NothingDoneError, UserError, located
from compress.surgery.layers import chosen, drop


def drop_layers(model: nn.Module, keep: int | Sequence[int] | Mapping[str, int | Sequence[int]]) -> Any:
    """Return a model with fewer layers. ``model`` is unchanged.

    Args:
        model: a float32 model without masks and without quantization.
        keep: a number of layers, an ascending list of layer numbers from 0, or a mapping with one of these for each
            stack (encoder or decoder), such as ``{"encoder": 3, "decoder": [5]}``. If a stack has six layers, a number
            selects the layers of DQ-BART (Li et al. 2022). Otherwise it selects evenly spaced layers.

    Returns:
        The shallower model, in the mode of ``model``.

    Raises:
        UserError: the model does not have these layers.
        NothingDoneError: every layer would be kept.

    Examples:
        >>> compress.drop_layers(model, 1).config.n_layer
        1
    """
    family = checked(model, "model", forbids=("masked", "quantized"))
    config: Any = model.config
    depths = {stack.name: stack.depth(config) for stack in family.stacks}
    asked = keep if isinstance(keep, Mapping) else dict.fromkeys(depths, keep)
    for each in asked.values():
        listed = isinstance(each, Sequence) and not isinstance(each, str) and all(type(layer) is int for layer in each)
        if type(each) is not int and not listed:
            raise UserError(f"keep: expected a number of layers or a list such as [0, 2, 5], got {each!r}")
    for name in asked:
        if name not in depths:
            raise ModelError(f"keep: this model has no layers named {name!r}; allowed: {', '.join(depths)}")
    layers = {name: _layers(each, depths[name]) for name, each in asked.items()}
    if all(left == list(range(depths[name])) for name, left in layers.items()):
        raise NothingDoneError(f"keep: {keep} keeps every layer; allowed: fewer than {depths}")
    before = ancestry_of(model, family)
    small = copy.deepcopy(model)
    drop(small, family, layers)
    remember_layers(small, family, before, layers)
    return small


def _layers(asked: int | Sequence[int], depth: int) -> list[int]:
    if not isinstance(asked, int):
        return list(asked)
    with located("keep"):
        return chosen(asked, depth)
