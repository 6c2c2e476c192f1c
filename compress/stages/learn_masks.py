"""Learn, or score, which units of a model matter: masks over heads, FFN neurons and the hidden dimension."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator
from torch import Tensor, nn

from compress.artifact import Artifact, save_masks, save_model
from compress.engine.masking import Method, unit_values, used_terms
from compress.engine.term_checks import term_problems
from compress.models import family_of
from compress.models.stock_files import copy_settings
from compress.models.structure import AxisKind
from compress.problem import Problem
from compress.stages.fitting import TaughtStage, Terms, fit, require_ancestor, side
from compress.stages.stage import Context, Result, Shape, Stage
from compress.surgery.masks import kind_problems
from compress.terms.logits import CrossEntropy, ForwardKL
from compress.terms.mask_l1 import MaskL1
from compress.training.config import Group, TrainConfig
from compress.training.loop import Trained
from compress.training.objective import LossTerm


def _default_terms(given: dict[str, Any]) -> tuple[LossTerm, ...]:
    return (ForwardKL(), MaskL1(weight=1e-4)) if given.get("method", "learned") == "learned" else (CrossEntropy(),)


class UnitFields(Stage):
    """Fields that select which units are masked, and how.

    The default of ``terms`` depends on these fields, so they must be validated before it. Pydantic validates the fields
    of the last base class first, which is why this class is a separate base.
    """

    axes: tuple[AxisKind, ...] = ("hidden", "heads", "ffn")
    method: Method = "learned"


class LearnMasks(TaughtStage, UnitFields):
    """Store one value per head, FFN neuron and hidden dimension. ``prune`` can cut the result to several sizes.

    ``learned`` (SIMPLE, Tao et al. 2023, section 3.1) trains masks, which start at 1, with distillation and an L1
    penalty. The weights are frozen unless ``weights_lr`` is given. The result has the masks of the last step, whatever
    ``train.keep`` says, because quality falls in evaluations while sparsity grows.

    The baselines keep all masks at 1 and keep the source's weights. They store scores that rank the units.
    ``magnitude`` is the L2 norm of a unit's weights. ``loss_aware`` is the sum of |m dL/dm|. ``movement`` is the sum of
    -m dL/dm while the weights train at ``weights_lr``. If the lowest movement score is negative, it is subtracted from
    all of them. The baselines omit ``mask_l1``, which is a constant when all masks are 1.
    """

    type: Literal["learn_masks"] = "learn_masks"
    terms: Terms = Field(default_factory=_default_terms)
    """The default is forward_kl and mask_l1 (weight 1e-4) to learn masks, and cross_entropy to score units."""
    weights_lr: float | None = Field(None, gt=0)
    train: TrainConfig = TrainConfig(steps=0)

    gives: ClassVar[frozenset[str]] = frozenset({"masked"})
    version: ClassVar[int] = 2

    @model_validator(mode="after")
    def _agrees(self) -> LearnMasks:
        if self.method == "movement" and self.weights_lr is None:
            raise ValueError("method movement needs weights_lr, because it follows weights during training")
        if self.method == "magnitude" and self.train.steps != 0:
            raise ValueError(
                "method magnitude reads the weights as they are, so there is nothing to train; leave train out"
            )
        if self.method != "magnitude" and self.train.steps == 0:
            raise ValueError(f"method {self.method} needs steps to train; give train: {{steps: N}}")
        if not self.axes or len(set(self.axes)) != len(self.axes):
            raise ValueError("axes needs at least one of hidden, heads, groups, ffn, and each at most once")
        return self

    def run(self, source: Artifact, out: Path, context: Context) -> Result:
        model = source.model(device=context.device)
        teacher = self.taught_by(context)
        if self.method != "magnitude":
            require_ancestor(self.terms, source, teacher)

        def trainer(
            changes: Mapping[str, Any], groups: Mapping[Group, Sequence[nn.Parameter]], extra: nn.Module | None
        ) -> Trained:
            return fit(
                side(source, model),
                used_terms(self.terms, self.method),
                self.train.model_copy(update=dict(changes)),
                out,
                context.trained_on(self.targets),
                name=self.name or self.type,
                teacher=teacher,
                groups=groups,
                extra=extra,
            )

        values, coverage, metrics = unit_values(
            model,
            source.family(),
            self.axes,
            self.method,
            weights_lr=self.weights_lr,
            device=context.device,
            trainer=trainer,
        )
        self._save(source, model, values, out)
        return Result(
            traits=self.traits_after(source.traits), coverage=coverage, kept=source.manifest.kept, metrics=metrics
        )

    def _save(self, source: Artifact, model: nn.Module, values: dict[str, Tensor], out: Path) -> None:
        if self.method == "learned" and self.weights_lr is not None:
            save_model(model, source, out)
        else:
            copy_settings(source.path, out)
            for file in source.path.glob("model*.safetensors*"):
                shutil.copyfile(file, out / file.name)
        save_masks(values, out, scores=self.method != "learned")

    def shape(self, source: Shape) -> Shape:
        return replace(super().shape(source), masked=self.axes, scored=self.method != "learned")

    def problems(self, source: Shape, teacher: Shape | None) -> Iterator[Problem]:
        yield from kind_problems(self.axes, family_of(source.config).axes(source.config))
        if self.method != "magnitude":
            yield from term_problems(used_terms(self.terms, self.method), source, teacher, masked=True)
            if self._scores_nothing(source, teacher):
                text = f"{source.name!r} has distance 0 from itself, so no unit gets a score; use cross_entropy"
                yield Problem(("terms",), text)

    def _scores_nothing(self, source: Shape, teacher: Shape | None) -> bool:
        itself = teacher is not None and teacher.name == source.name
        return (
            self.method != "learned"
            and itself
            and {term.needs_teacher for term in used_terms(self.terms, self.method)} == {True}
        )
