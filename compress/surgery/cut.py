"""Remove units (heads, FFN neurons, hidden dimensions) permanently. The result computes the same as the masked model.

An axis is a prunable dimension: the heads or FFN neurons of one layer, or the hidden dimensions of the whole model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from compress.errors import ModelError
from compress.models.family import ModelFamily
from compress.models.layout import refresh_sizes
from compress.models.structure import MASKS, Axis, sides, sized_axes, stock_tensors, with_fields
from compress.surgery.coverage import Coverage

Keep = Mapping[str, Tensor | Sequence[int]]
"""A dict from axis name to the ascending indices of the units to keep. An axis that is not listed keeps all units."""


def ranked(scores: Mapping[str, Tensor], sizes: Mapping[str, int], axes: Iterable[Axis] = ()) -> dict[str, Tensor]:
    """Return the ``sizes[axis]`` units of each axis with the largest |score|, ascending. Ties go to the earlier unit.

    If ``axes`` has an axis of groups, groups are chosen first. Then the same number of units is chosen from each kept
    group. A group that holds a single unit is kept or removed with that unit.

    Raises ModelError for a size outside 1 ... number of units, for a size that the kept groups cannot share equally,
    and for an axis without scores.
    """
    axes = list(axes)
    whole_sizes = {axis.name: axis.size for axis in axes}
    groups = {
        axis.holds: axis for axis in axes if axis.holds and (axis.name in sizes or whole_sizes[axis.holds] > axis.size)
    }
    keep = {axis: _top(axis, scores.get(axis), size) for axis, size in sizes.items() if axis not in groups}
    for axis in (axis for axis in sizes if axis in groups):
        group = groups[axis]
        whole = keep.get(group.name, torch.arange(group.size))
        keep[axis] = _top_within(axis, scores.get(axis), sizes[axis], whole, group.size)
    return keep


def _top_within(axis: str, scores: Tensor | None, size: int, kept_groups: Tensor, groups: int) -> Tensor:
    if scores is None:
        raise ModelError(f"axis {axis!r} has no scores to choose the {size} units to keep")
    each, rest = divmod(size, len(kept_groups))
    held = len(scores) // groups
    if rest or not 1 <= each <= held:
        allowed = ", ".join(str(len(kept_groups) * count) for count in range(1, held + 1))
        raise ModelError(f"axis {axis!r} cannot keep {size} units in {len(kept_groups)} groups; allowed: {allowed}")
    rows = scores.detach().cpu().view(groups, held)[kept_groups]
    chosen = [_top(axis, row, each) + group * held for row, group in zip(rows, kept_groups.tolist(), strict=True)]
    return torch.cat(chosen)


def _top(axis: str, scores: Tensor | None, size: int) -> Tensor:
    if scores is None:
        raise ModelError(f"axis {axis!r} has no scores to choose the {size} units to keep")
    if not 1 <= size <= len(scores):
        raise ModelError(f"axis {axis!r} cannot keep {size} units; allowed: 1 to {len(scores)}")
    return scores.detach().abs().argsort(descending=True, stable=True)[:size].sort().values.cpu()


def compose(first: Keep, second: Keep) -> dict[str, Tensor]:
    """Return the units of the original model (root) that remain after cutting ``first`` and then ``second``.

    The indices of ``second`` count the units that ``first`` kept.
    """
    kept = {axis: torch.as_tensor(units).cpu() for axis, units in first.items()}
    for axis, units in second.items():
        index = torch.as_tensor(units).cpu()
        kept[axis] = kept[axis][index] if axis in kept else index
    return kept


@torch.no_grad()
def cut(model: nn.Module, family: ModelFamily, keep: Keep) -> Coverage:
    """Keep only these units of the current model, in place, and report what was touched.

    Parameters are replaced by smaller ones. Shared parameters stay shared, and buffers stay unchanged. The
    forward pass of transformers runs at any sizes. The config is updated if the transformers classes can express the
    new sizes; otherwise it stays the config of the model before the cut. If transformers scales token embeddings by the
    hidden size, the weights are rescaled to compensate. When a group is removed, its query heads are removed too.

    Raises ModelError for an unknown axis, for indices that are not ascending and in range, for an axis left empty, for
    kept groups that would hold different numbers of query heads, and for a model with masks attached.
    """
    if hasattr(model, MASKS):
        raise ModelError("detach the masks of a model before it is cut")
    axes = sized_axes(model, family)
    indices = losing(axes, keep)
    before = stock_tensors(model)
    bytes_before = _bytes(before)
    smaller = _smaller(model, axes, indices)
    modules = [module for module in model.modules() if module._parameters]
    touched = [module for module in modules if _replace(module, smaller)]
    sizes = {axis.name: axis.size for axis in axes}
    after = sizes | {name: len(index) for name, index in indices.items()}
    fields = family.stock_sizes(model.config, after)
    with_fields(model.config, fields or {})
    family.refresh(model)
    _rescale(model, family, sizes["hidden"], after["hidden"])
    return Coverage(
        modules_touched=len(touched),
        modules_total=len(modules),
        parameters_touched=sum(parameter.numel() for parameter in smaller),
        parameters_total=sum(tensor.numel() for tensor in before if isinstance(tensor, nn.Parameter)),
        bytes_before=bytes_before,
        bytes_after=_bytes(stock_tensors(model)),
    )


def cut_to_sizes(model: nn.Module, family: ModelFamily, sizes: Mapping[str, int]) -> None:
    """Cut a model to these sizes without choosing units. Meant for a model whose weights are filled in afterwards."""
    axes = sized_axes(model, family)
    smaller = {axis.name: sizes[axis.name] for axis in axes if sizes.get(axis.name, axis.size) < axis.size}
    cut(model, family, ranked({axis.name: torch.ones(axis.size) for axis in axes}, smaller, axes))


def losing(axes: Iterable[Axis], keep: Keep) -> dict[str, Tensor]:
    """Return the axes that lose units, with the indices of the units they keep. Raises ModelError like :func:`cut`."""
    axes = list(axes)
    sizes = {axis.name: axis.size for axis in axes}
    indices = {}
    for axis, units in keep.items():
        if axis not in sizes:
            raise ModelError(f"keep names axis {axis!r}, which this model lacks; allowed: {', '.join(sizes)}")
        index = torch.as_tensor(units, dtype=torch.long).cpu()
        ascending = len(index) > 0 and bool((index.diff() > 0).all())
        if not ascending or index[0] < 0 or index[-1] >= sizes[axis]:
            raise ModelError(f"keep of axis {axis!r} must be ascending indices, at least one, below {sizes[axis]}")
        if len(index) < sizes[axis]:
            indices[axis] = index
    return _with_held(axes, indices)


def _with_held(axes: Iterable[Axis], indices: dict[str, Tensor]) -> dict[str, Tensor]:
    """Also remove the units of removed groups, and groups without units. The rest must hold equally many units."""
    named = {axis.name: axis for axis in axes}
    for group in [axis for axis in named.values() if axis.holds]:
        heads = named[group.holds]
        held = heads.size // group.size
        if heads.name in indices:
            left, counts = (indices[heads.name] // held).unique(return_counts=True)
            whole = indices.get(group.name, left)
            if counts.unique().numel() != 1 or not torch.equal(left, whole):
                raise ModelError(
                    f"keep of axis {heads.name!r} must contain the same number of units of each of {len(whole)} groups"
                )
            indices |= {group.name: left} if len(left) < group.size else {}
        elif group.name in indices:
            indices[heads.name] = (indices[group.name][:, None] * held + torch.arange(held)).flatten()
    return indices


def _smaller(model: nn.Module, axes: Iterable[Axis], indices: Mapping[str, Tensor]) -> dict[nn.Parameter, nn.Parameter]:
    """Return each distinct parameter that loses channels, with its replacement."""
    channels = {
        (side.parameter, side.dim): side.slot.channels(indices[side.axis.name], side.axis.size)
        for side in sides(model, axes)
        if side.axis.name in indices
    }
    values: dict[nn.Parameter, Tensor] = {}
    for (parameter, dim), index in channels.items():
        values[parameter] = values.get(parameter, parameter).index_select(dim, index.to(parameter.device))
    return {old: nn.Parameter(value, requires_grad=old.requires_grad) for old, value in values.items()}


def _replace(module: nn.Module, smaller: Mapping[nn.Parameter, nn.Parameter]) -> bool:
    own = {name: smaller[old] for name, old in module._parameters.items() if old is not None and old in smaller}
    for name, parameter in own.items():
        setattr(module, name, parameter)
    refresh_sizes(module)
    return bool(own)


def _rescale(model: nn.Module, family: ModelFamily, before: int, after: int) -> None:
    """Keep scale x embedding unchanged. A tied head reads the rescaled embedding, so its input is scaled back."""
    factor = family.embedding_scale(model.config, before) / family.embedding_scale(model.config, after)
    if factor == 1.0:
        return
    embeddings = {model.get_submodule(name).get_parameter("weight") for name in family.embeddings}
    for embedding in embeddings:
        embedding.mul_(factor)
    if model.get_submodule(family.head).get_parameter("weight") in embeddings:
        norm = model.get_submodule(family.final_norm(model.config))
        for parameter in norm.parameters():
            parameter.div_(factor)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
