"""Prune a model: keep its most important units (attention heads, FFN neurons, hidden dimensions)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import nn

from compress.api.arguments import configured, require_flag
from compress.api.unit_masks import Masks
from compress.engine.models import ancestry_of, checked, remember_cut
from compress.engine.pruning import Target, cut_to
from compress.errors import ModelError, NothingDoneError, UserError
from compress.models.family import ModelFamily
from compress.models.structure import AxisKind, sized_axes
from compress.surgery.masks import attach, fold


def prune(
    model: nn.Module,
    masks: Masks,
    *,
    keep: str | Mapping[AxisKind, str] | None = None,
    parameters: float | None = None,
    uniform: bool = True,
    fold_masks: bool = False,
) -> Any:
    """Return a smaller model with the units whose |mask| is largest. ``model`` is unchanged.

    Units are attention heads, FFN neurons and hidden dimensions. A prunable dimension of the model is called an axis.
    The result is a transformers model of the same class with smaller tensors. If its config can express the new sizes
    (as with one fraction for every axis), it can be saved with ``save_pretrained`` and opened by any tool. Other
    shapes, such as half of a GPT-2's heads alone, are saved with :func:`compress.save`.

    Args:
        model: the model that the masks belong to.
        masks: from :func:`learn_masks` or :func:`score`.
        keep: an exact fraction such as ``"2/4"`` for every masked axis, or one per kind of axis: ``{"heads": "2/4"}``.
        parameters: a budget, instead of ``keep``: a share of the parameters (up to 1) or a number of parameters.
        uniform: keep the same number of units in every layer. If false, units are ranked across all layers. Query heads
            that share keys and values are then ranked in rows (one head of each kept group) by their mean value.
        fold_masks: multiply the values of learned masks into the weights of the kept units.

    Returns:
        The smaller model, in the mode (training or evaluation) of ``model``.

    Raises:
        UserError: an argument cannot be used.
        NothingDoneError: every unit would be kept.

    Examples:
        >>> small = compress.prune(model, compress.score(model), keep="2/4")
        >>> type(small).__name__, small.config.n_embd, small.config.n_head
        ('GPT2LMHeadModel', 16, 2)
    """
    family = checked(model, "model", forbids=("masked", "quantized"))
    if not isinstance(masks, Masks):
        raise UserError(f"masks: expected Masks, from learn_masks or score, got {type(masks).__name__}")
    if (keep is None) == (parameters is None):
        raise UserError("keep: give either keep (a fraction such as '2/4') or parameters (a budget)")
    require_flag(uniform, "uniform")
    require_flag(fold_masks, "fold_masks")
    if fold_masks and masks.scored:
        raise UserError("fold_masks: these are scores, whose masks are all 1 and change no weight; allowed: False")
    target = configured(Target, keep=keep, parameters=parameters, uniform=uniform)
    _require_fitting(model, family, masks)
    before = ancestry_of(model, family)
    small = copy.deepcopy(model)
    if fold_masks:
        attach(small, family, _kinds(small, family, masks), {axis: each.clone() for axis, each in masks.values.items()})
        fold(small, family)
    coverage, kept = cut_to(small, masks.values, target)
    if coverage.modules_touched == 0:
        raise NothingDoneError(
            f"keep: {parameters if keep is None else keep} keeps every unit; allowed: less than the whole"
        )
    remember_cut(small, before, kept)
    return small


def _kinds(model: nn.Module, family: ModelFamily, masks: Masks) -> list[AxisKind]:
    return sorted({axis.kind for axis in sized_axes(model, family) if axis.name in masks.values})


def _require_fitting(model: nn.Module, family: ModelFamily, masks: Masks) -> None:
    sizes = {axis.name: axis.size for axis in sized_axes(model, family)}
    for axis, value in masks.values.items():
        if not bool(value.isfinite().all()):
            raise ModelError(f"masks: a value for {axis!r} is not finite, so its units cannot be ranked")
        if sizes.get(axis) != value.numel():
            has = f"{sizes[axis]} units" if axis in sizes else "no such axis"
            raise ModelError(f"masks: there are {value.numel()} values for {axis!r}, but the model has {has}")
