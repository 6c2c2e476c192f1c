"""Learn, or score, which units of a model matter: masks over heads, FFN neurons and the hidden dimension."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from compress.artifact import Artifact, save_masks, save_model
from compress.distributed import collectives
from compress.functional import importance
from compress.models import family_of
from compress.models.stock_files import copy_settings
from compress.models.structure import MASKS, AxisKind, sized_axes, stock_tensors
from compress.schema import added
from compress.stages.fitting import Terms, fit, require_ancestor, side, term_problems
from compress.stages.stage import Context, Result, Shape, Stage
from compress.surgery.coverage import Coverage
from compress.surgery.masks import attach, detach, masks_of
from compress.surgery.units import unit_weights
from compress.terms.logits import CrossEntropy, ForwardKL
from compress.terms.mask_l1 import MaskL1
from compress.training.config import TrainConfig
from compress.training.objective import LossTerm

Method = Literal["learned", "magnitude", "loss_aware", "movement"]


def _default_terms(given: dict[str, Any]) -> tuple[LossTerm, ...]:
    return (ForwardKL(), MaskL1(weight=1e-4)) if given.get("method", "learned") == "learned" else (CrossEntropy(),)


class LearnMasks(Stage):
    """One value per head, FFN neuron and hidden dimension; ``prune`` cuts the result to any number of sizes.

    ``learned`` (SIMPLE, Tao et al. 2023, section 3.1) trains masks from 1 under distillation and an L1 penalty, with
    the weights frozen unless ``weights_lr`` is given. The masks of the last step are handed on whatever ``train.keep``
    says: sparsity grows while the evaluation falls. The baselines leave masks at 1, hand on the source's weights and
    store scores to rank units by: ``magnitude`` the L2 norm of a unit's weights, ``loss_aware`` the summed |m dL/dm|,
    ``movement`` the summed -m dL/dm while the weights train at ``weights_lr``, less the lowest of them where that is
    negative. ``mask_l1`` is a constant there and left out.
    """

    type: Literal["learn_masks"] = "learn_masks"
    axes: tuple[AxisKind, ...] = ("hidden", "heads", "ffn")
    method: Method = "learned"
    teacher: str | None = None
    terms: Terms = Field(default_factory=_default_terms)
    """Without it, forward_kl and mask_l1 (weight 1e-4) to learn masks, cross_entropy to score units."""
    weights_lr: float | None = Field(None, gt=0)
    train: TrainConfig = TrainConfig(steps=0)
    targets: str | None = added(None)
    """A result of ``seq_kd``, whose targets take the place of those of ``data.train``."""

    forbids: ClassVar[frozenset[str]] = frozenset({"masked", "quantized", "onnx", "bitsandbytes"})
    gives: ClassVar[frozenset[str]] = frozenset({"masked"})
    trains: ClassVar[bool] = True
    version: ClassVar[int] = 2

    @model_validator(mode="after")
    def _agrees(self) -> LearnMasks:
        if self.method == "movement" and self.weights_lr is None:
            raise ValueError("method movement follows weights while they train; give weights_lr")
        if self.method == "magnitude" and self.train.steps != 0:
            raise ValueError(
                "method magnitude reads the weights as they are, so there is nothing to train; leave train out"
            )
        if self.method != "magnitude" and self.train.steps == 0:
            raise ValueError(f"method {self.method} needs steps to train; give train: {{steps: N}}")
        if not self.axes or len(set(self.axes)) != len(self.axes):
            raise ValueError("axes names each of hidden, heads, ffn at most once, and one at least")
        return self

    def run(self, source: Artifact, out: Path, context: Context) -> Result:
        model = source.model(device=context.device)
        model.requires_grad_(self.weights_lr is not None)
        attach(model, source.family(), self.axes)
        metrics: dict[str, float] = {}
        if self.method == "magnitude":
            axes = [axis for axis in sized_axes(model, source.family()) if axis.name in masks_of(model)]
            values = {axis.name: importance.magnitude(unit_weights(model, axis)) for axis in axes}
        else:
            values, metrics = self._trained(source, model, out, context)
        coverage = _coverage(model, values)
        detach(model)
        self._save(source, model, values, out)
        return Result(traits=source.traits | self.gives, coverage=coverage, kept=source.manifest.kept, metrics=metrics)

    def _trained(
        self, source: Artifact, model: nn.Module, out: Path, context: Context
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        teacher = context.models[self.teacher] if self.teacher else None
        require_ancestor(self.terms, source, teacher)
        masks = masks_of(model)
        scores = None if self.method == "learned" else _Scores(masks, self.method).to(context.device)
        changes = {"keep": "last", "lr": self.weights_lr or 0.0} | ({} if scores is None else {"mask_lr": 0.0})
        trained = fit(
            side(source, model),
            self._used(),
            self.train.model_copy(update=changes),
            out,
            context.trained_on(self.targets),
            name=self.name or self.type,
            teacher=teacher,
            groups={
                "masks": list(masks.values()),
                "weights": [weight for name, weight in model.named_parameters() if not name.startswith(MASKS)],
            },
            extra=scores,
        )
        if scores is None:
            return {axis: mask.detach() for axis, mask in masks.items()}, trained.metrics
        return scores.values(), trained.metrics

    def _used(self) -> list[LossTerm]:
        return [term for term in self.terms if self.method == "learned" or not isinstance(term, MaskL1)]

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

    def problems(self, source: Shape, teacher: Shape | None) -> Iterator[str]:
        if self.method != "magnitude":
            yield from term_problems(self._used(), source, teacher, masked=True)
            if self._scores_nothing(source, teacher):
                yield f"terms: {source.name!r} is at distance 0 from itself, so no unit would score; use cross_entropy"

    def _scores_nothing(self, source: Shape, teacher: Shape | None) -> bool:
        itself = teacher is not None and teacher.name == source.name
        return self.method != "learned" and itself and {term.needs_teacher for term in self._used()} == {True}


def _coverage(model: nn.Module, values: Mapping[str, Tensor]) -> Coverage:
    axes = sized_axes(model, family_of(model.config))
    size = sum(tensor.numel() * tensor.element_size() for tensor in stock_tensors(model))
    return Coverage(
        modules_touched=len(values),
        modules_total=len(axes),
        parameters_touched=sum(value.numel() for value in values.values()),
        parameters_total=sum(axis.size for axis in axes),
        bytes_before=size,
        bytes_after=size,
        note="axes in place of modules, units in place of parameters",
    )


class _Scores(nn.Module):
    """Importance summed over batches from the gradients that reach masks held at 1; travels with checkpoints."""

    def __init__(self, masks: dict[str, nn.Parameter], method: Method) -> None:
        super().__init__()
        score = importance.loss_aware if method == "loss_aware" else importance.movement
        for axis, mask in masks.items():
            buffer = axis.replace(".", "/")
            self.register_buffer(buffer, torch.zeros_like(mask))
            mask.register_hook(self._adding(buffer, mask, score))

    def _adding(self, buffer: str, mask: Tensor, score: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor], None]:
        def add(grad: Tensor) -> None:
            getattr(self, buffer).add_(score(mask.detach(), collectives.mean(grad)))

        return add

    def values(self) -> dict[str, Tensor]:
        """The sums, by axis, lifted by one number where that takes to have none negative."""
        sums = {name.replace("/", "."): buffer for name, buffer in self.named_buffers()}
        lowest = min(0.0, *(total.min().item() for total in sums.values()))
        return {axis: total - lowest for axis, total in sums.items()}
