"""Make a smaller model of the units that matter."""

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
    """Make a smaller model of the units with the largest |mask|. ``model`` is unchanged.

    The result is a stock model of smaller tensors, of the same class. Where the stock config can say its
    sizes (one fraction for every axis, by default), it can be saved with ``save_pretrained`` and opened anywhere. Other
    shapes, such as half of a GPT-2's heads alone, are saved with :func:`compress.save`.

    Args:
        model: the model that the masks are of.
        masks: from :func:`learn_masks` or :func:`score`.
        keep: an exact fraction such as ``"2/4"`` for every masked axis, or one per kind: ``{"heads": "2/4"}``.
        parameters: in place of ``keep``, a budget: a share of the parameters (up to 1) or a count.
        uniform: keep equally many units in every layer; without it units are ranked across layers, and query heads that
            share keys and values in rows of one head per kept group, by the mean of their values.
        fold_masks: multiply the values of learned masks into the weights of the kept units.

    Returns:
        The smaller model, in the mode (training or evaluation) of ``model``.

    Raises:
        UserError: an argument that cannot be used.
        NothingDoneError: every unit would stay.

    Examples:
        >>> small = compress.prune(model, compress.score(model), keep="2/4")
        >>> type(small).__name__, small.config.n_embd, small.config.n_head
        ('GPT2LMHeadModel', 16, 2)
    """
    family = checked(model, "model", forbids=("masked", "quantized"))
    if not isinstance(masks, Masks):
        raise UserError(f"masks: a {type(masks).__name__} is not a Masks; use learn_masks or score")
    if (keep is None) == (parameters is None):
        raise UserError("keep: give either keep (a fraction such as '2/4') or parameters (a budget)")
    require_flag(uniform, "uniform")
    require_flag(fold_masks, "fold_masks")
    if fold_masks and masks.scored:
        raise UserError("fold_masks: these are scores, and masks of 1 change nothing; allowed: False")
    target = configured(Target, keep=keep, parameters=parameters, uniform=uniform)
    _require_fitting(model, family, masks)
    before = ancestry_of(model, family)
    small = copy.deepcopy(model)
    if fold_masks:
        attach(small, family, _kinds(small, family, masks), {axis: each.clone() for axis, each in masks.values.items()})
        fold(small, family)
    coverage, kept = cut_to(small, masks.values, target)
    if coverage.modules_touched == 0:
        raise NothingDoneError(f"keep: {keep or parameters} keeps every unit; allowed: less than the whole")
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
