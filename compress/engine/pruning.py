"""Prune a model by the values of its units: heads, FFN neurons, hidden dimensions (SIMPLE, Tao et al. 2023)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator, Field, PlainSerializer
from torch import Tensor, nn

from compress.errors import ModelError
from compress.models import family_of
from compress.models.loading import build
from compress.models.structure import Axis, AxisKind, count_parameters, sized_axes
from compress.problem import Problem
from compress.schema import Strict
from compress.surgery.coverage import Coverage
from compress.surgery.cut import cut, losing, ranked


def _fraction(value: Any) -> Any:
    if isinstance(value, Fraction):
        return value
    try:
        return Fraction(str(value))
    except (ValueError, ZeroDivisionError):
        raise ValueError("write an exact fraction such as 2/4") from None


Ratio = Annotated[
    Fraction, BeforeValidator(_fraction), Field(gt=0, le=1), PlainSerializer(str, return_type=str, when_used="json")
]


class Target(Strict):
    """How many units to keep.

    ``keep`` is one exact fraction for every masked axis (prunable dimension), or one per kind of axis. ``parameters``
    selects instead the largest uniform fraction within a budget: a share of the model's parameters (up to 1) or a
    number of parameters. ``uniform`` keeps the same number of units in every layer. Otherwise units are ranked across
    layers, sizes are rounded, and every layer keeps at least one unit. Query heads that share keys and values are then
    ranked in rows (one head of each kept group) by their mean value. Every kept group keeps at least one head, and half
    a row is rounded down.
    """

    keep: dict[AxisKind, Ratio] | Ratio | None = None
    parameters: float | None = Field(None, gt=0)
    uniform: bool = True

    def sizes(self, config: Any, sizes: Mapping[str, int], kinds: Mapping[str, AxisKind]) -> dict[str, int]:
        """Return a dict from masked axis to the number of units to keep.

        Args:
            config: the transformers config.
            sizes: a dict from axis name to its present number of units.
            kinds: a dict from masked axis to its kind.

        Raises:
            ModelError: a fraction that does not give whole numbers, a kind without masks, or an impossible budget.
        """
        ratios = self._ratios(config, sizes, kinds)
        exact = {axis: sizes[axis] * ratios[kind] for axis, kind in kinds.items()}
        groups = _groups(family_of(config).axes(config))
        if self.uniform:
            _require_equal_groups(exact, sizes, groups)
        uneven = next((axis for axis, target in exact.items() if target.denominator != 1), None)
        if uneven is not None and self.uniform:
            size = sizes[uneven] if isinstance(self.keep, dict) else math.gcd(*(sizes[axis] for axis in kinds))
            allowed = "".join(f"{units}/{size}, " for units in range(1, min(size, 17)))  # all of them would be no cut
            allowed += "..., " if size > 17 else ""
            text = (
                f"{ratios[kinds[uneven]]} of the {sizes[uneven]} units of {uneven} is not a whole number; "
                f"allowed: {allowed}{'or ' if allowed else ''}uniform: false, which rounds"
            )
            raise ModelError(Problem(("keep",), text))
        rounded = _rounded(exact)
        rest = 0  # heads that rounding left over so far; with masks on groups the total can differ from the cut's
        for heads, group in groups.items():
            if heads in rounded and group not in rounded and sizes[heads] == sizes[group]:
                rounded[group] = rounded[heads]
            elif heads in rounded:
                kept, held = rounded.get(group, sizes[group]), sizes[heads] // sizes[group]
                rest += rounded[heads]
                rows = max(1, math.ceil(Fraction(rest, kept) - Fraction(1, 2)))
                rounded[heads] = (rows if self.uniform else min(rows, held)) * kept
                rest -= rounded[heads]
            elif group in rounded:
                rounded[heads] = sizes[heads] // sizes[group] * rounded[group]
        return rounded

    def wanted(self, config: Any, sizes: Mapping[str, int], kinds: Mapping[str, AxisKind]) -> dict[str, int]:
        """Return a dict from masked axis to the units to keep, before query heads are distributed among groups."""
        ratios = self._ratios(config, sizes, kinds)
        return _rounded({axis: sizes[axis] * ratios[kind] for axis, kind in kinds.items()})

    def _ratios(self, config: Any, sizes: Mapping[str, int], kinds: Mapping[str, AxisKind]) -> dict[AxisKind, Fraction]:
        present = sorted(set(kinds.values()))
        if isinstance(self.keep, dict):
            if unmasked := sorted(set(self.keep) - set(present)):
                text = f"the source has no such masks; it has {', '.join(present)}"
                raise ModelError(Problem(("keep", unmasked[0]), text))
            return {kind: self.keep.get(kind, Fraction(1)) for kind in present}
        ratio = self.keep if self.keep is not None else self._within_budget(config, sizes, list(kinds))
        return dict.fromkeys(present, ratio)

    def _within_budget(self, config: Any, sizes: Mapping[str, int], masked: Sequence[str]) -> Fraction:
        assert self.parameters is not None
        axes = family_of(config).axes(config)
        with torch.device("meta"):
            model = build(config)
        whole = count_parameters(model, axes, sizes)
        budget = self.parameters * float(whole) if self.parameters <= 1 else self.parameters
        held = {axis.name: sizes[axis.holds] // sizes[axis.name] for axis in axes if axis.holds in masked}
        steps = math.gcd(*(sizes[axis] for axis in masked), *(count for count in held.values() if count > 1))
        masked = [*masked, *(axis for axis, count in held.items() if count == 1)]
        for left in range(steps, 0, -1):
            small = {axis: size * left // steps if axis in masked else size for axis, size in sizes.items()}
            if float(count_parameters(model, axes, small)) <= budget:
                return Fraction(left, steps)
        text = (
            f"{self.parameters:g} is below the smallest uniform cut, 1/{steps} of every axis; "
            f"allowed: at least {float(count_parameters(model, axes, small)):,.0f}"
        )
        raise ModelError(Problem(("parameters",), text))


def cut_to(model: nn.Module, values: Mapping[str, Tensor], target: Target) -> tuple[Coverage, dict[str, Tensor]]:
    """Keep the units with the largest |value| and remove the rest, in place.

    Returns:
        The coverage, and a dict from axis name to the kept units.
    """
    config: Any = model.config
    family = family_of(config)
    scores = {axis: value.abs() for axis, value in values.items()}
    axes = sized_axes(model, family)
    kinds = {axis.name: axis.kind for axis in axes if axis.name in scores}
    now = {axis.name: axis.size for axis in axes}
    if target.uniform:
        targets = target.sizes(config, now, kinds)
    else:
        targets = _across_layers(target.wanted(config, now, kinds), kinds, scores, axes)
    keep = ranked(scores, {axis: size for axis, size in targets.items() if axis in scores}, axes)
    keep |= {group: keep[heads] for heads, group in _groups(axes).items() if heads in keep and now[heads] == now[group]}
    keep |= losing(axes, keep)
    return cut(model, family, keep), keep


def _require_equal_groups(exact: Mapping[str, Fraction], sizes: Mapping[str, int], groups: Mapping[str, str]) -> None:
    """Raise ModelError for a fraction of query heads that does not divide equally among the kept groups."""
    for heads, group in groups.items():
        if heads not in exact or (sizes[heads] == sizes[group] and group not in exact):
            continue
        kept = exact.get(group, Fraction(sizes[group]))
        if (exact[heads] / kept).denominator != 1:
            held = sizes[heads] // sizes[group]
            allowed = ", ".join(f"{count}/{held}" for count in range(1, held)) or "1"
            text = (
                f"{exact[heads] / sizes[heads]} of the {sizes[heads]} units of {heads} does not leave the "
                f"same number in each of {kept} groups; allowed: {allowed}, or masks on groups"
            )
            raise ModelError(Problem(("keep",), text))


def _rounded(exact: Mapping[str, Fraction]) -> dict[str, int]:
    return {axis: max(1, round(target)) for axis, target in exact.items()}


def _across_layers(
    wanted: Mapping[str, int], kinds: Mapping[str, AxisKind], scores: Mapping[str, Tensor], axes: Sequence[Axis]
) -> dict[str, int]:
    """Distribute the total of each kind of axis among layers by ranking all its units together.

    A row is one unit. For query heads that share keys and values, a row is one head of each kept group, with the mean
    of their values.
    """
    groups, now = _groups(axes), {axis.name: axis.size for axis in axes}
    shared: dict[str, int] = {}
    for kind in sorted(set(kinds.values()), key=lambda kind: kind != "groups"):  # heads lie in the groups that are kept
        rows, width = {}, {}
        for axis in (axis for axis in kinds if kinds[axis] == kind):
            units, group = scores[axis].double()[None], groups.get(axis)
            if group is not None and (group in kinds or now[axis] > now[group]):
                units = units.view(now[group], -1)
                units = units[ranked(scores, {group: shared[group]})[group]] if group in kinds else units
            rows[axis], width[axis] = units.sort(descending=True).values.mean(0), len(units)
        shared |= _taken(sum(wanted[axis] for axis in rows), rows, width)
    return shared


def _taken(total: int, rows: Mapping[str, Tensor], width: Mapping[str, int]) -> dict[str, int]:
    """Return a dict from axis to its number of units.

    Every axis keeps its first row. Then the highest rows of all axes are kept, while more than half a row is missing.
    """
    taken = dict(width)
    rest = total - sum(taken.values())
    owner = [axis for axis in rows for _ in range(len(rows[axis]) - 1)]
    order = torch.cat([values[1:] for values in rows.values()]).sort(descending=True, stable=True).indices
    for axis in (owner[at] for at in order.tolist()):
        if 2 * rest <= width[axis]:
            break
        taken[axis] += width[axis]
        rest -= width[axis]
    return taken


def _groups(axes: Sequence[Axis]) -> dict[str, str]:
    """Return a dict from each axis of heads that has an axis of groups to that axis."""
    return {axis.holds: axis.name for axis in axes if axis.holds}
