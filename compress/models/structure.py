"""The structure of a model as data: the modules of its layers, and which tensor dimensions shrink together.

An axis is a prunable dimension, such as the heads or FFN neurons of one layer, or the hidden dimensions of the model.
Its units are what pruning removes: single heads, neurons or hidden dimensions.

A family fills the tables of layers; axes and attentions are derived from them. Masks, cutting, parameter counts,
quantization targets, export and reload read these. None of them depends on a model's name.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from compress.models.layout import outputs_of, slot_dims

if TYPE_CHECKING:
    from compress.models.family import ModelFamily

AxisKind = Literal["hidden", "heads", "ffn", "groups"]
Task = Literal["causal", "seq2seq"]

IGNORE = -100
"""The label of a position that does not count in the loss, as in transformers."""

MASKS = "compress_masks"
"""Submodule that holds the masks attached to a model. It is not part of the transformers model."""


@dataclass(frozen=True)
class AttentionTable:
    """One attention of a layer. Module names are relative to the layer. ``axis`` is the name of its heads axis.

    If one fused linear layer computes query, key and value, its name is given three times.
    """

    module: str
    query: str
    key: str
    value: str
    out: str
    norm: str
    axis: str = "heads"
    causal: bool = True
    cross: bool = False

    @property
    def fused(self) -> bool:
        """Whether one linear layer computes query, key and value, in this order."""
        return self.query == self.key

    def head_counts(self, layer: nn.Module, size: int) -> tuple[int, int]:
        """Count the query heads and key/value heads of ``size`` channels in the tensors of a layer."""
        parts = 3 if self.fused else 1
        query, key = (outputs_of(layer.get_submodule(name)) for name in (self.query, self.key))
        return query // (parts * size), key // (parts * size)


@dataclass(frozen=True)
class FeedForwardTable:
    """The FFN of a layer: names of its normalization and linear layers. ``gate`` is empty if there is none."""

    norm: str
    up: str
    down: str
    gate: str = ""


@dataclass(frozen=True)
class LayerStack:
    """A stack (encoder or decoder): the modules of its chain of layers, and the config fields with its sizes."""

    name: str
    layers: str
    """Path of the list of modules."""
    axes: str
    """Prefix of the axis names of layer N, before ``.N.``."""
    fields: tuple[str, ...]
    """Config fields that hold the number of layers."""
    heads: str
    """Config field with the number of query heads."""
    ffn: str
    """Config field with the number of FFN neurons. If the field is None, there are four times the hidden size."""
    tokens: str
    """Path of the token embedding."""
    attentions: tuple[AttentionTable, ...]
    feed_forward: FeedForwardTable
    kv_heads: str = ""
    """Config field with the number of key/value heads. Empty if there are as many as query heads."""
    positions: str = ""
    """Path of the table of learned positions. Empty if there is none."""
    position_offset: int = 0
    """Row of that table for position 0."""
    rotary: str = ""
    """Path of the module with the frequencies of rotary positions. Empty if there is none."""
    rotary_settings: tuple[str, ...] = ()
    """Config fields that may hold the rotary settings. The name depends on the version of transformers."""
    embedding_norm: str = ""
    """Path of the normalization of the embeddings. Empty if there is none."""
    final_norm: str = ""
    """Path of the normalization after the last layer. Empty if that layer already ends with one."""

    def depth(self, config: Any) -> int:
        """Return the number of layers of this stack in a transformers config."""
        return int(getattr(config, self.fields[0]))

    def layer_of(self, axis: str) -> int | None:
        """Return the layer that an axis belongs to. None if the axis belongs to another stack or to no stack."""
        if not axis.startswith(f"{self.axes}."):
            return None
        return int(axis.removeprefix(f"{self.axes}.").partition(".")[0])


@dataclass(frozen=True)
class Slot:
    """The input or the output of a module, which shrinks with an axis.

    ``in`` is the input of a linear layer. ``out`` is the output of a linear layer, embedding or normalization. A unit
    covers ``width`` neighbouring channels (the head size for a head) in each of ``blocks`` fused parts (3 for a fused
    query, key and value).
    """

    module: str
    side: Literal["in", "out"]
    width: int = 1
    blocks: int = 1

    def channels(self, units: Tensor, size: int) -> Tensor:
        """Return channels [blocks x kept x width] of these units, given indices [kept] out of ``size`` units."""
        block = (units[:, None] * self.width + torch.arange(self.width, device=units.device)).flatten()
        starts = torch.arange(self.blocks, device=units.device) * size * self.width
        return (starts[:, None] + block).flatten()

    def spread(self, values: Tensor) -> Tensor:
        """Return one value per unit [size] repeated for each of its channels [blocks x size x width]."""
        if self.width > 1:
            values = values.repeat_interleave(self.width)
        return values.repeat(self.blocks) if self.blocks > 1 else values


@dataclass(frozen=True)
class Axis:
    """A prunable dimension, named ``hidden``, ``layer.3.heads`` or ``layer.3.ffn``, and where its units are.

    The units of a ``groups`` axis are key/value heads. ``holds`` names the heads axis. Each group holds the same number
    of neighbouring query heads of that axis, which share it. Removing a group removes its query heads. Removing its
    last query head removes the group. All remaining groups keep equally many query heads.
    """

    name: str
    kind: AxisKind
    size: int
    slots: tuple[Slot, ...]
    holds: str = ""


@dataclass(frozen=True)
class Projection:
    """The source of a query, key or value: part ``block`` of the ``blocks`` fused parts of a module's output."""

    module: str
    block: int = 0
    blocks: int = 1


@dataclass(frozen=True)
class Attention:
    """One attention: its heads axis, its three projections, and whether it is causal."""

    axis: str
    query: Projection
    key: Projection
    value: Projection
    causal: bool
    cross: bool = False
    kv_axis: str = ""
    """The axis that keys and values shrink with. This is the groups axis if query heads share them."""


def with_fields(config: Any, fields: Mapping[str, Any]) -> Any:
    """Set fields of a transformers config in place and return it."""
    for name, value in fields.items():
        setattr(config, name, value)
    return config


def common(sizes: Iterable[int], default: int) -> int | None:
    """Return the size that all share, or None if they differ. ``default`` if there are no sizes."""
    distinct = set(sizes) or {default}
    return distinct.pop() if len(distinct) == 1 else None


@dataclass(frozen=True)
class Side:
    """A dimension of a parameter that a slot stands for."""

    axis: Axis
    slot: Slot
    module: nn.Module
    parameter: nn.Parameter
    dim: int


def sides(model: nn.Module, axes: Iterable[Axis]) -> Iterator[Side]:
    """Yield every parameter dimension that shrinks with these axes; a shared parameter once per module that uses it."""
    for axis in axes:
        for slot in axis.slots:
            module = model.get_submodule(slot.module)
            for name, dim in slot_dims(module, slot.side):
                yield Side(axis, slot, module, getattr(module, name), dim)


def sized_axes(model: nn.Module, family: ModelFamily) -> tuple[Axis, ...]:
    """Return the axes of this model with the sizes of its tensors, whether or not its config can express them."""

    def measured(axis: Axis) -> int:
        side = next(sides(model, [axis]))
        return side.parameter.shape[side.dim] // (side.slot.width * side.slot.blocks)

    return tuple(replace(axis, size=measured(axis)) for axis in family.axes(model.config))


def stock_tensors(model: nn.Module) -> list[Tensor]:
    """Return every parameter and saved buffer of the transformers model, shared ones once."""
    state = model.state_dict(keep_vars=True)
    return list({id(tensor): tensor for name, tensor in state.items() if not name.startswith(f"{MASKS}.")}.values())


def count_parameters(
    model: nn.Module, axes: Iterable[Axis], sizes: Mapping[str, Tensor | int | float]
) -> Tensor | int | float:
    """Return the number of values the model holds at these axis sizes. Axes that are not listed keep their size.

    This is the sum over tensors of the product of their dimensions. Shared parameters count once, and saved buffers
    such as ``final_logits_bias`` are included. The count is exact. It is differentiable in sizes given as tensors,
    which are converted to float64 because float32 is not exact beyond 2^24.
    """
    extents: defaultdict[int, dict[int, Any]] = defaultdict(dict)
    for side in sides(model, axes):
        size = sizes.get(side.axis.name, side.axis.size)
        wide = size.double() if isinstance(size, Tensor) else size
        extents[id(side.parameter)][side.dim] = wide * side.slot.width * side.slot.blocks
    total: Tensor | int | float = 0
    for tensor in stock_tensors(model):
        resized = extents.get(id(tensor), {})
        total = total + math.prod(resized.get(dim, size) for dim, size in enumerate(tensor.shape))
    return total
