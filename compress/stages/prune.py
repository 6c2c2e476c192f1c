"""Cut a masked model to smaller tensors of the same classes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from compress.artifact import Artifact, save_model
from compress.engine.pruning import Ratio, Target, cut_to
from compress.errors import ModelError
from compress.models import family_of
from compress.models.structure import AxisKind, sized_axes
from compress.problem import Problem
from compress.stages.stage import LOAD_ONLY, Context, Result, Shape, Stage
from compress.surgery.cut import compose
from compress.surgery.masks import detach, fold


class Prune(Stage):
    """Keep the units with the largest |m| and permanently remove the others (SIMPLE, Tao et al. 2023).

    Units are heads, FFN neurons or hidden dimensions; each such prunable dimension of the model is an axis. ``keep`` is
    one exact fraction for every masked axis (``2/4``) or one per kind (``{heads: 2/4, ffn: 1/4}``).
    ``parameters`` is a budget instead: a share of the source's parameters, or a count. The largest uniform fraction
    within the budget is kept.

    Uniform cuts keep the same number of units in every layer, which transformers configs can express. ``uniform:
    false`` ranks heads and FFN neurons across layers, rounds their number, and keeps at least one of each per layer.
    Query heads that share keys and values are ranked in rows of one head per kept group. No config can express some
    sizes, for example if it fixes the ratio of heads to hidden size and the cut changes it. Such models open with
    ``compress.load`` only; plan, run and report say so.

    Kept units get mask 1. ``fold: true`` multiplies their mask values into the weights.
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
        values = source.masks()
        if self.fold:
            fold(model, family)
        else:
            detach(model)
        coverage, keep = cut_to(model, values, self._target)
        coverage.require(f"{self.name or self.type}: prune to {self.keep or self.parameters}")
        after = {axis.name: axis.size for axis in sized_axes(model, family)}
        if family.uniform_config(source.config(), after) is None:
            coverage = coverage.model_copy(update={"note": LOAD_ONLY})
        save_model(model, source, out)
        return Result(
            traits=self.traits_after(source.traits),
            coverage=coverage,
            kept={axis: units.tolist() for axis, units in compose(source.manifest.kept, keep).items()},
        )

    def problems(self, source: Shape, teacher: Shape | None) -> Iterator[Problem]:
        try:
            after = self.shape(source)
        except ModelError as error:
            yield error.problem
        else:
            if after.sizes == source.sizes:
                yield Problem(("keep" if self.parameters is None else "parameters",), "every unit would stay")
        if self.fold and source.scored:
            text = f"{source.name!r} has scores, and masks that are 1 change nothing; allowed: false"
            yield Problem(("fold",), text)

    def shape(self, source: Shape) -> Shape:
        axes = family_of(source.config).axes(source.config)
        kinds = {axis.name: axis.kind for axis in axes if axis.kind in source.masked}
        targets = self._target.sizes(source.config, source.sizes, kinds)
        return replace(super().shape(source), sizes={**source.sizes, **targets}, masked=(), scored=False)

    @property
    def _target(self) -> Target:
        return Target(keep=self.keep, parameters=self.parameters, uniform=self.uniform)
