"""What a model family looks like, as data: which sides of which tensors shrink together, and how many units they hold.

Masks, cutting, parameter counts, quantization targets, export and reload read these tables; none of them knows a
model's name.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from compress.models.layout import slot_dims

if TYPE_CHECKING:
    from compress.models.family import ModelFamily

AxisKind = Literal["hidden", "heads", "ffn", "groups"]
Task = Literal["causal", "seq2seq"]

IGNORE = -100
"""The label of a position that is not scored, as the stock losses have it."""

MASKS = "compress_masks"
"""Submodule that holds the masks attached to a model; not a part of the stock model."""


@dataclass(frozen=True)
class Slot:
    """One side of one module that shrinks with an axis.

    ``in`` is the input of a product; ``out`` the output of a product, an embedding or a normalization. A unit covers
    ``width`` neighbouring channels (the head size for a head) in each of ``blocks`` fused parts (3 for a fused query,
    key and value).
    """

    module: str
    side: Literal["in", "out"]
    width: int = 1
    blocks: int = 1

    def channels(self, units: Tensor, size: int) -> Tensor:
        """Channels [blocks x kept x width] of these units, given indices [kept] out of ``size`` units."""
        block = (units[:, None] * self.width + torch.arange(self.width, device=units.device)).flatten()
        starts = torch.arange(self.blocks, device=units.device) * size * self.width
        return (starts[:, None] + block).flatten()

    def spread(self, values: Tensor) -> Tensor:
        """One value per unit [size] repeated for each of its channels [blocks x size x width]."""
        if self.width > 1:
            values = values.repeat_interleave(self.width)
        return values.repeat(self.blocks) if self.blocks > 1 else values


@dataclass(frozen=True)
class Axis:
    """Units of one kind, such as those of ``hidden``, ``layer.3.heads`` or ``layer.3.ffn``.

    The units of a ``groups`` axis are key/value heads. Each ``holds`` equally many neighbouring units of the heads axis
    of that name: the query heads that share it. They go with it, it goes with the last of them, and all groups that are
    left keep equally many.
    """

    name: str
    kind: AxisKind
    size: int
    slots: tuple[Slot, ...]
    holds: str = ""


@dataclass(frozen=True)
class Projection:
    """Where a query, key or value comes from: part ``block`` of the ``blocks`` fused parts of a module's output."""

    module: str
    block: int = 0
    blocks: int = 1


@dataclass(frozen=True)
class Attention:
    """One attention: its heads axis, its three projections, and whether earlier positions cannot see later ones."""

    axis: str
    query: Projection
    key: Projection
    value: Projection
    causal: bool
    cross: bool = False
    kv_axis: str = ""
    """The axis that keys and values shrink with: the groups axis where query heads share them."""


def with_fields(config: Any, fields: Mapping[str, Any]) -> Any:
    """Set fields of a stock config in place and return it."""
    for name, value in fields.items():
        setattr(config, name, value)
    return config


def common(sizes: Iterable[int], default: int) -> int | None:
    """The one size that all share (``default`` where there is none), or None where they differ."""
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
    """Every dimension of every parameter that shrinks with these axes; a shared parameter comes once per call site."""
    for axis in axes:
        for slot in axis.slots:
            module = model.get_submodule(slot.module)
            for name, dim in slot_dims(module, slot.side):
                yield Side(axis, slot, module, getattr(module, name), dim)


def sized_axes(model: nn.Module, family: ModelFamily) -> tuple[Axis, ...]:
    """The axes of this model with the sizes that its tensors have, whether or not its config can say them."""

    def measured(axis: Axis) -> int:
        side = next(sides(model, [axis]))
        return side.parameter.shape[side.dim] // (side.slot.width * side.slot.blocks)

    return tuple(replace(axis, size=measured(axis)) for axis in family.axes(model.config))


def stock_tensors(model: nn.Module) -> list[Tensor]:
    """Every parameter and saved buffer of the stock model, shared ones once."""
    state = model.state_dict(keep_vars=True)
    return list({id(tensor): tensor for name, tensor in state.items() if not name.startswith(f"{MASKS}.")}.values())


def count_parameters(
    model: nn.Module, axes: Iterable[Axis], sizes: Mapping[str, Tensor | int | float]
) -> Tensor | int | float:
    """How many numbers the model holds at these axis sizes (absent axes: as they are).

    The sum over tensors of the product of their dimensions; shared parameters count once, saved buffers such as
    ``final_logits_bias`` are included. Exact, and differentiable in sizes given as tensors, which are widened to
    float64 because float32 is not exact beyond 2^24.
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
