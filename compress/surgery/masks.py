"""Masks on the prunable dimensions (axes) of a transformers model: a learnable factor per unit; 0 removes the unit.

Axes are the heads and FFN neurons of each layer and the hidden dimensions; a unit is one head, neuron or dimension.

SIMPLE (Tao et al., Findings of ACL 2023, figure 1). The hidden mask multiplies each write to the residual stream (the
outputs of embeddings and of linear layers that write to it) and each normalization's output once. Masks of heads and of
FFN neurons multiply the input of the linear layer that reads them. Normalizations compute their statistics over the
units with m != 0, as the cut model does. So m = 1 gives the unmasked model, and a binary m gives the model that ``cut``
returns.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from compress.errors import ModelError, NothingDoneError
from compress.models.family import ModelFamily
from compress.models.layout import NormKind, norm_epsilon, norm_kind, slot_dims
from compress.models.structure import MASKS, Axis, AxisKind, Slot, sized_axes
from compress.problem import Problem


class Masks(nn.Module):
    """One parameter per axis, [size], initialised to 1 and named after its axis with ``/`` for each dot."""

    def __init__(self, axes: Collection[Axis], *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.axes = tuple(axes)
        self.handles: list[RemovableHandle] = []
        for axis in axes:
            self.register_parameter(_key(axis.name), nn.Parameter(torch.ones(axis.size, dtype=dtype, device=device)))

    def __getitem__(self, axis: str) -> nn.Parameter:
        return self.get_parameter(_key(axis))

    def named(self) -> dict[str, nn.Parameter]:
        """Return a dict from axis name to mask parameter."""
        return {axis.name: self[axis.name] for axis in self.axes}

    @torch.no_grad()
    def load(self, values: Mapping[str, Tensor]) -> None:
        """Set every mask. Raises ModelError if names or sizes differ from the axes."""
        expected = {axis.name: axis.size for axis in self.axes}
        found = {axis: value.numel() for axis, value in values.items()}
        if found != expected:
            wrong = sorted(dict(found.items() ^ expected.items()))
            raise ModelError(
                f"masks must have the names and sizes of the model's axes; they differ in {', '.join(wrong[:3])}"
            )
        for axis, value in values.items():
            self[axis].copy_(value)


def masks_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return a dict from axis name to mask parameter. Raises ModelError for a model without masks."""
    return _attached(model).named()


def attach(
    model: nn.Module, family: ModelFamily, axes: Collection[AxisKind], values: Mapping[str, Tensor] | None = None
) -> Masks:
    """Mask every axis of these kinds and return the masks. They start at ``values``, a dict from axis name, or at 1.

    The masks become the submodule ``compress_masks``. They move, train and checkpoint with the model, but
    ``save_pretrained`` writes only the tensors of the plain model. Raises NothingDoneError if no axis is of these
    kinds, and ModelError for a model that already has masks.
    """
    if hasattr(model, MASKS):
        raise ModelError("this model has masks attached already")
    every = sized_axes(model, family)
    chosen = [axis for axis in every if axis.kind in axes]
    if not chosen:
        raise NothingDoneError(f"masks on {sorted(axes)}: the model has no axis of these kinds")
    like = model.get_submodule(family.head).get_parameter("weight")
    masks = Masks(chosen, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
    if values is not None:
        masks.load(values)
    for axis, slot, module in _masked_slots(model, every, chosen):
        masks.handles.append(_hook(module, masks, axis, slot))
    model.add_module(MASKS, masks)
    _ignore_on_save(model, add=True)
    return masks


def kind_problems(kinds: Iterable[AxisKind], axes: Iterable[Axis]) -> Iterator[Problem]:
    """Yield a problem of the field ``axes`` for each kind that no axis has."""
    have = list(dict.fromkeys(axis.kind for axis in axes))
    for kind in kinds:
        if kind not in have:
            yield Problem(("axes",), f"{kind!r} is not an axis of this model; allowed: {', '.join(have)}")


def detach(model: nn.Module) -> dict[str, Tensor]:
    """Remove the masks, restore the transformers model, and return a dict from axis name to mask values."""
    masks = _attached(model)
    _ignore_on_save(model, add=False)
    for handle in masks.handles:
        handle.remove()
    delattr(model, MASKS)
    return {axis: mask.detach() for axis, mask in masks.named().items()}


@torch.no_grad()
def fold(model: nn.Module, family: ModelFamily) -> None:
    """Multiply the masks into the weights and remove them. The plain model then computes the same as the masked one.

    Units with m = 0 must be cut afterwards, because a plain normalization includes them in its statistics. If head and
    embedding are tied, the hidden mask goes into the head's weight and not into the normalization before it.
    """
    masks = _attached(model)
    embeddings = {id(model.get_submodule(name).get_parameter("weight")) for name in family.embeddings}
    tied = id(model.get_submodule(family.head).get_parameter("weight")) in embeddings
    masked = [
        (axis, slot, module)
        for axis, slot, module in _masked_slots(model, sized_axes(model, family), masks.axes)
        if not (tied and (slot.module, slot.side) == (family.final_norm(model.config), "out"))
    ]
    factors = {
        (module.get_parameter(name), dim, axis.name): slot.spread(masks[axis.name])
        for axis, slot, module in masked
        for name, dim in slot_dims(module, slot.side)
    }
    for (parameter, dim, _), factor in factors.items():
        shape = [1] * parameter.dim()
        shape[dim] = -1
        parameter.mul_(factor.view(shape))
    detach(model)


def _masked_slots(
    model: nn.Module, axes: Collection[Axis], masked: Collection[Axis]
) -> Iterator[tuple[Axis, Slot, nn.Module]]:
    """Where each mask multiplies: modules that write hidden units, and modules that read heads or FFN units.

    Each module comes once. A group of query heads is masked where its heads are read.
    """
    held = {axis.name: axis for axis in axes}
    seen: set[tuple[nn.Module, str, str]] = set()
    for axis in masked:
        slots = axis.slots
        if axis.holds:
            heads = held[axis.holds]
            slots = tuple(replace(slot, width=slot.width * heads.size // axis.size) for slot in heads.slots)
        for slot in slots:
            module = model.get_submodule(slot.module)
            key = module, slot.side, axis.kind
            if slot.side == ("out" if axis.kind == "hidden" else "in") and key not in seen:
                seen.add(key)
                yield axis, slot, module


def _hook(module: nn.Module, masks: Masks, axis: Axis, slot: Slot) -> RemovableHandle:
    if slot.side == "in":
        return module.register_forward_pre_hook(partial(_mask_input, masks, axis.name, slot))
    kind = norm_kind(module)
    hook = _mask_output if kind is None else partial(_mask_norm, _NORMS[kind])
    return module.register_forward_hook(partial(hook, masks, axis.name, slot))


def _mask_input(masks: Masks, axis: str, slot: Slot, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    states, *rest = args
    return (states * slot.spread(masks[axis]).to(states.dtype), *rest)


def _mask_output(masks: Masks, axis: str, slot: Slot, module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * slot.spread(masks[axis]).to(output.dtype)


def _mask_norm(
    norm_over: NormOver, masks: Masks, axis: str, slot: Slot, module: Any, args: Any, output: Tensor
) -> Tensor:
    mask = slot.spread(masks[axis])
    return norm_over(args[0], mask != 0, module).to(output.dtype) * mask.to(output.dtype)


def _layer_norm_over(states: Tensor, opened: Tensor, norm: Any) -> Tensor:
    """Compute layer normalization whose mean and variance run over the units with m != 0 (opened), in float32 or wider.

    Closed units are set to the mean of the opened ones. The variance over all units is then the variance over the
    opened units times their share. Dividing by the square root of the share corrects this, epsilon included, and the
    gain multiplies the root back. One fused operator therefore suffices, without waiting for the device. With all units
    open, the result equals the plain one bit for bit. With none open, it is finite.
    """
    wide = states.to(torch.promote_types(states.dtype, torch.float32))
    count = opened.sum().clamp(min=1).to(wide.dtype)
    root = (count / len(opened)).sqrt()
    mean = wide.where(opened, 0).sum(-1, keepdim=True) / count
    gain, bias = norm.weight.to(wide.dtype) * root, norm.bias.to(wide.dtype)
    return F.layer_norm(wide.where(opened, mean) / root, norm.normalized_shape, gain, bias, norm.eps)


def _rms_norm_over(states: Tensor, opened: Tensor, norm: Any) -> Tensor:
    """Compute RMS normalization whose mean square runs over the units with m != 0 (opened), in float32 or wider.

    With all units open, the result equals that of the plain module bit for bit. With none open, it is finite.
    """
    wide = states.to(torch.promote_types(states.dtype, torch.float32)).where(opened, 0)
    count = opened.sum().clamp(min=1).to(wide.dtype)
    mean = wide.pow(2).mean(-1, keepdim=True) * (len(opened) / count)
    gain: Tensor = norm.weight.to(wide.dtype)
    return gain * (wide * torch.rsqrt(mean + norm_epsilon(norm)))


NormOver = Callable[[Tensor, Tensor, Any], Tensor]
_NORMS: dict[NormKind, NormOver] = {"layer": _layer_norm_over, "rms": _rms_norm_over}


def _ignore_on_save(model: Any, *, add: bool) -> None:
    """Make ``save_pretrained`` leave the masks out. Transformers reads this list of state dict keys."""
    keys = {f"{MASKS}.{key}" for key, _ in _attached(model).named_parameters()}
    others = set(getattr(model, "_keys_to_ignore_on_save", None) or ()) - keys
    model._keys_to_ignore_on_save = others | keys if add else others


def _attached(model: nn.Module) -> Masks:
    masks = getattr(model, MASKS, None)
    if not isinstance(masks, Masks):
        raise ModelError("this model has no masks attached")
    return masks


def _key(axis: str) -> str:
    return axis.replace(".", "/")
