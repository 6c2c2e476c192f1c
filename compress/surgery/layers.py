"""Remove whole layers permanently. The remaining layers of the model keep their order and their weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import nn

from compress.errors import ModelError
from compress.models.family import ModelFamily
from compress.models.layout import weight_of
from compress.models.structure import MASKS, LayerStack, Projection, sized_axes, stock_tensors, with_fields
from compress.surgery.coverage import Coverage, owners

Layers = Mapping[str, Sequence[int]]
"""A dict from stack (``encoder`` or ``decoder``) to the ascending numbers of the layers to keep.

A stack that is not listed keeps all of its layers."""

DQ_BART: Mapping[int, tuple[int, ...]] = {
    1: (5,),
    2: (0, 5),
    3: (0, 2, 5),
    4: (0, 2, 3, 5),
    5: (0, 1, 3, 4, 5),
    6: (0, 1, 2, 3, 4, 5),
}
"""The layers kept out of six, by the number of kept layers (Li et al., DQ-BART, ACL 2022)."""

T = TypeVar("T")


def chosen(count: int, depth: int) -> list[int]:
    """Choose which ``count`` of ``depth`` layers to keep: DQ-BART's choice for six, otherwise evenly spaced ones.

    Kept layer i of n is i (depth - 1) / (n - 1), rounded with halves down, so the first and the last layer are kept.
    For n = 1 it is the last layer. This rule is our own; for six layers it agrees with DQ-BART except at n = 5. Raises
    ModelError for a count outside 1 ... depth.
    """
    if not 1 <= count <= depth:
        raise ModelError(f"cannot keep {count} of {depth} layers; allowed: 1 to {depth}")
    if depth == 6:
        return list(DQ_BART[count])
    if count == 1:
        return [depth - 1]
    steps = count - 1
    return [-((steps - 2 * i * (depth - 1)) // (2 * steps)) for i in range(count)]


def renumbered(family: ModelFamily, values: Mapping[str, T], keep: Layers) -> dict[str, T]:
    """Return a dict from axis name to values, without the axes of dropped layers. Kept layers get their new names."""
    named = {axis: _name_after(family, axis, keep) for axis in values}
    return {name: values[axis] for axis, name in named.items() if name is not None}


def shallower(config: Any, family: ModelFamily, keep: Layers) -> Any:
    """Return a copy of a transformers config with the remaining number of layers."""
    return with_fields(copy.deepcopy(config), dict(_counts(family, keep)))


@torch.no_grad()
def drop(model: nn.Module, family: ModelFamily, keep: Layers) -> Coverage:
    """Keep only these layers of the current model, in place, and report what was removed.

    The kept layers are renumbered in order. If transformers scales attention scores by the layer number, the query
    weights are rescaled to compensate. The config is updated. This includes sizes that differed between layers and are
    now equal, so that the transformers classes can express them.

    Raises ModelError for an unknown stack (encoder or decoder), for layers that are not ascending and in range, for a
    stack left empty, and for a model with masks attached.
    """
    if hasattr(model, MASKS):
        raise ModelError("detach the masks of a model before its layers are dropped")
    _check(model, family, keep)
    before, owning = stock_tensors(model), len(owners(model))
    numbers = sum(parameter.numel() for parameter in model.parameters())
    for stack in family.stacks:
        if stack.name in keep:
            _rescale(model, family, stack, keep[stack.name])
            layers: Any = model.get_submodule(stack.layers)
            for n in sorted(set(range(len(layers))) - set(keep[stack.name]), reverse=True):
                del layers[n]
    with_fields(model.config, dict(_counts(family, keep)))
    sizes = {axis.name: axis.size for axis in sized_axes(model, family)}
    with_fields(model.config, family.stock_sizes(model.config, sizes) or {})
    family.refresh(model)
    return Coverage(
        modules_touched=owning - len(owners(model)),
        modules_total=owning,
        parameters_touched=numbers - sum(parameter.numel() for parameter in model.parameters()),
        parameters_total=numbers,
        bytes_before=sum(tensor.numel() * tensor.element_size() for tensor in before),
        bytes_after=sum(tensor.numel() * tensor.element_size() for tensor in stock_tensors(model)),
    )


def _name_after(family: ModelFamily, axis: str, keep: Layers) -> str | None:
    """Return the name of an axis after layers are dropped, or None if its own layer is dropped."""
    for stack in family.stacks:
        layer = stack.layer_of(axis)
        if layer is not None and stack.name in keep:
            kept = list(keep[stack.name])
            kind = axis.removeprefix(f"{stack.axes}.{layer}.")
            return f"{stack.axes}.{kept.index(layer)}.{kind}" if layer in kept else None
    return axis


def _counts(family: ModelFamily, keep: Layers) -> Iterator[tuple[str, int]]:
    for stack in family.stacks:
        if stack.name in keep:
            yield from ((field, len(keep[stack.name])) for field in stack.fields)


def _check(model: Any, family: ModelFamily, keep: Layers) -> None:
    depths = {stack.name: stack.depth(model.config) for stack in family.stacks}
    for name, layers in keep.items():
        if name not in depths:
            raise ModelError(f"keep names layers {name!r}, which this model lacks; allowed: {', '.join(depths)}")
        ascending = len(layers) > 0 and all(a < b for a, b in pairwise(layers))
        if not ascending or layers[0] < 0 or layers[-1] >= depths[name]:
            raise ModelError(f"keep of {name!r} must be ascending layers, at least one, below {depths[name]}")


def _rescale(model: nn.Module, family: ModelFamily, stack: LayerStack, kept: Sequence[int]) -> None:
    """Rescale the queries of renumbered layers, so that their attention scores do not change."""
    config: Any = model.config
    queries = [(stack.layer_of(attention.axis), attention.query) for attention in family.attentions(config)]
    for new, old in enumerate(kept):
        factor = family.score_scale(config, old) / family.score_scale(config, new)
        for layer, query in queries:
            if layer == old and factor != 1.0:
                _multiply(model.get_submodule(query.module), query, factor)


def _multiply(module: nn.Module, part: Projection, factor: float) -> None:
    weight_of(module).chunk(part.blocks)[part.block].mul_(factor)
    if isinstance(bias := getattr(module, "bias", None), torch.Tensor):
        bias.chunk(part.blocks)[part.block].mul_(factor)
