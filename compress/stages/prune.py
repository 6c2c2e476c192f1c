"""Cut a masked model to size: smaller tensors, same classes."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BeforeValidator, Field, PlainSerializer, model_validator
from torch import Tensor

from compress.artifact import Artifact, save_model
from compress.errors import ModelError
from compress.models import family_of
from compress.models.loading import build
from compress.models.structure import AxisKind, count_parameters, sized_axes
from compress.stages.stage import LOAD_ONLY, Context, Result, Shape, Stage
from compress.surgery.cut import compose, cut, ranked
from compress.surgery.masks import detach, fold


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


class Prune(Stage):
    """Keep the units with the largest |m| and remove the rest for good (SIMPLE, Tao et al. 2023).

    ``keep`` is one exact fraction for every masked axis (``2/4``) or one per kind (``{heads: 2/4, ffn: 1/4}``);
    ``parameters`` asks instead for the largest uniform fraction within a budget, a share of the source's parameters or
    a count. Uniform cuts keep as many units in every layer, which stock classes can express; ``uniform: false`` ranks
    heads and FFN neurons across layers, rounds, and keeps one of each per layer. Sizes that no stock class has, as of
    heads in another ratio than hidden where a config ties them, open with ``compress.load`` only; plan, run and report
    say so.
    Kept units get mask 1; ``fold: true`` multiplies their mask values into the weights.
    """

    type: Literal["prune"] = "prune"
    keep: dict[AxisKind, Ratio] | Ratio | None = None
    parameters: float | None = Field(None, gt=0)
    uniform: bool = True
    fold: bool = False

    needs: ClassVar[frozenset[str]] = frozenset({"masked"})
    forbids: ClassVar[frozenset[str]] = frozenset({"quantized", "onnx", "bitsandbytes"})
    gives: ClassVar[frozenset[str]] = frozenset({"pruned"})
    takes: ClassVar[frozenset[str]] = frozenset({"masked"})

    @model_validator(mode="after")
    def _one_target(self) -> Prune:
        if (self.keep is None) == (self.parameters is None):
            raise ValueError("give either keep (a fraction such as 2/4) or parameters (a budget)")
        return self

    def run(self, source: Artifact, out: Path, context: Context) -> Result:
        model = source.model()
        family = source.family()
        scores = {axis: value.abs() for axis, value in source.masks().items()}
        if self.fold:
            fold(model, family)
        else:
            detach(model)
        axes = sized_axes(model, family)
        kinds = {axis.name: axis.kind for axis in axes if axis.name in scores}
        targets = self._targets(source.config(), {axis.name: axis.size for axis in axes}, kinds)
        if not self.uniform:
            targets = _across_layers(targets, kinds, scores)
        keep = ranked(scores, targets)
        coverage = cut(model, family, keep)
        coverage.require(f"{self.name or self.type}: prune to {self.keep or self.parameters}")
        after = {axis.name: axis.size for axis in sized_axes(model, family)}
        if family.uniform_config(source.config(), after) is None:
            coverage = coverage.model_copy(update={"note": LOAD_ONLY})
        save_model(model, source, out)
        return Result(
            traits=source.traits - self.takes | self.gives,
            coverage=coverage,
            kept={axis: units.tolist() for axis, units in compose(source.manifest.kept, keep).items()},
        )

    def problems(self, source: Shape, teacher: Shape | None) -> Iterator[str]:
        try:
            after = self.shape(source)
        except ModelError as error:
            yield str(error)
        else:
            if after.sizes == source.sizes:
                yield f"{'keep' if self.parameters is None else 'parameters'}: every unit would stay"
        if self.fold and source.scored:
            yield f"fold: {source.name!r} holds scores, and masks that are 1 change nothing; allowed: false"

    def shape(self, source: Shape) -> Shape:
        axes = family_of(source.config).axes(source.config)
        kinds = {axis.name: axis.kind for axis in axes if axis.kind in source.masked}
        targets = self._targets(source.config, source.sizes, kinds)
        return replace(super().shape(source), sizes={**source.sizes, **targets}, masked=(), scored=False)

    def _targets(self, config: Any, sizes: Mapping[str, int], kinds: Mapping[str, AxisKind]) -> dict[str, int]:
        """Units to keep on each masked axis (those in ``kinds``); ``sizes`` has every axis of the source."""
        ratios = self._ratios(config, sizes, kinds)
        exact = {axis: sizes[axis] * ratios[kind] for axis, kind in kinds.items()}
        uneven = next((axis for axis, target in exact.items() if target.denominator != 1), None)
        if uneven is not None and self.uniform:
            size = sizes[uneven] if isinstance(self.keep, dict) else math.gcd(*(sizes[axis] for axis in kinds))
            allowed = "".join(f"{units}/{size}, " for units in range(1, min(size, 17)))  # all of them would be no cut
            allowed += "..., " if size > 17 else ""
            raise ModelError(
                f"keep: {ratios[kinds[uneven]]} of the {sizes[uneven]} units of {uneven} is no whole number; "
                f"allowed: {allowed}{'or ' if allowed else ''}uniform: false, which rounds"
            )
        return {axis: max(1, round(target)) for axis, target in exact.items()}

    def _ratios(self, config: Any, sizes: Mapping[str, int], kinds: Mapping[str, AxisKind]) -> dict[AxisKind, Fraction]:
        present = sorted(set(kinds.values()))
        if isinstance(self.keep, dict):
            if unmasked := sorted(set(self.keep) - set(present)):
                raise ModelError(f"keep.{unmasked[0]}: the source has no such masks; it has {', '.join(present)}")
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
        steps = math.gcd(*(sizes[axis] for axis in masked))
        for left in range(steps, 0, -1):
            small = {axis: size * left // steps if axis in masked else size for axis, size in sizes.items()}
            if float(count_parameters(model, axes, small)) <= budget:
                return Fraction(left, steps)
        raise ModelError(
            f"parameters: {self.parameters:g} is below the smallest uniform cut, 1/{steps} of every axis; "
            f"allowed: at least {float(count_parameters(model, axes, small)):,.0f}"
        )


def _across_layers(
    targets: Mapping[str, int], kinds: Mapping[str, AxisKind], scores: Mapping[str, Tensor]
) -> dict[str, int]:
    """Share each kind's total among layers by ranking all its units together, one at least per layer."""
    layers: dict[AxisKind, list[str]] = defaultdict(list)
    for axis in targets:
        layers[kinds[axis]].append(axis)
    shared = dict(targets)
    for axes in layers.values():
        rest = torch.cat([scores[axis].sort(descending=True).values[1:] for axis in axes])
        owner = [axis for axis in axes for _ in range(len(scores[axis]) - 1)]
        extra = sum(targets[axis] for axis in axes) - len(axes)
        chosen = rest.sort(descending=True, stable=True).indices[:extra].tolist()
        shared |= {axis: 1 + sum(owner[i] == axis for i in chosen) for axis in axes}
    return shared
