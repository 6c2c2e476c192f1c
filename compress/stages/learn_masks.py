"""Learn, or score, which units of a model matter: masks over heads, FFN neurons and the hidden dimension."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from safetensors.torch import save_file
from torch import Tensor, nn

from compress.artifact import MASKS, Artifact, copy_settings, save_model
from compress.functional import importance
from compress.models import family_of
from compress.models.structure import AxisKind, sized_axes, stock_tensors
from compress.stages.fitting import Terms, fit, require_ancestor, side, term_problems
from compress.stages.stage import Context, Result, Shape, Stage
from compress.surgery.coverage import Coverage
from compress.surgery.mask import attach, detach, masks_of
from compress.surgery.unit import unit_weights
from compress.terms.logits import ForwardKL
from compress.terms.mask_l1 import MaskL1
from compress.training import Group, TrainConfig

Method = Literal["learned", "magnitude", "loss_aware", "movement"]


class LearnMasks(Stage):
    """One value per head, FFN neuron and hidden dimension; ``prune`` cuts the result to any number of sizes.

    ``learned`` (SIMPLE, Tao et al. 2023, section 3.1) trains masks from 1 under distillation and an L1 penalty, with
    the weights frozen unless ``weights_lr`` is given. The baselines leave masks at 1 and store scores in their place:
    ``magnitude`` the L2 norm of a unit's weights, ``loss_aware`` the summed |m dL/dm|, ``movement`` the summed
    -m dL/dm while the weights train at ``weights_lr``.
    """

    type: Literal["learn_masks"] = "learn_masks"
    axes: tuple[AxisKind, ...] = ("hidden", "heads", "ffn")
    method: Method = "learned"
    teacher: str | None = None
    terms: Terms = (ForwardKL(), MaskL1(weight=1e-4))
    weights_lr: float | None = Field(None, gt=0)
    train: TrainConfig = TrainConfig(steps=0)

    forbids: ClassVar[frozenset[str]] = frozenset({"masked", "quantized", "onnx", "bitsandbytes"})
    gives: ClassVar[frozenset[str]] = frozenset({"masked"})
    trains: ClassVar[bool] = True

    @model_validator(mode="after")
    def _agrees(self) -> LearnMasks:
        if self.method == "movement" and self.weights_lr is None:
            raise ValueError("method movement follows weights while they train; give weights_lr")
        if self.method != "magnitude" and self.train.steps == 0:
            raise ValueError(f"method {self.method} needs steps to train; give train: {{steps: N}}")
        if not self.axes or len(set(self.axes)) != len(self.axes):
            raise ValueError("axes names each of hidden, heads, ffn at most once, and one at least")
        return self

    def run(self, source: Artifact, out: Path, context: Context) -> Result:
        model = source.model(device=context.device)
        family = source.family()
        teacher = context.models[self.teacher] if self.teacher else None
        require_ancestor(self.terms, source, teacher)
        model.requires_grad_(self.weights_lr is not None)
        weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
        attach(model, family, self.axes)
        masks = masks_of(model)
        metrics: dict[str, float] = {}
        values: dict[str, Tensor] = {}
        if self.method == "magnitude":
            axes = [axis for axis in family.axes(model.config) if axis.name in masks]
            values = {axis.name: importance.magnitude(unit_weights(model, axis)) for axis in axes}
        else:
            scores = None if self.method == "learned" else _Scores(masks, self.method).to(context.device)
            groups: dict[Group, list[nn.Parameter]] = {"masks": list(masks.values()), "weights": weights}
            rates = {"lr": self.weights_lr or 0.0} | ({"mask_lr": 0.0} if scores is not None else {})
            config = self.train.model_copy(update=rates)
            trained = fit(
                side(source, model),
                self.terms,
                config,
                out,
                context,
                name=self.name or self.type,
                teacher=teacher,
                groups=groups,
                extra=scores,
            )
            metrics = trained.metrics
            values = {axis: mask.detach() for axis, mask in masks.items()} if scores is None else scores.values()
        coverage = _coverage(model, values)
        detach(model)
        self._save(source, model, values, out)
        return Result(traits=source.traits | self.gives, coverage=coverage, kept=source.manifest.kept, metrics=metrics)

    def _save(self, source: Artifact, model: nn.Module, values: dict[str, Tensor], out: Path) -> None:
        if self.method == "learned" and self.weights_lr is not None:
            save_model(model, source, out)
        else:
            copy_settings(source, out)
            for file in source.path.glob("model*.safetensors*"):
                shutil.copyfile(file, out / file.name)
        state = {axis.replace(".", "/"): value.detach().cpu().float().contiguous() for axis, value in values.items()}
        save_file(state, out / MASKS)

    def shape(self, source: Shape) -> Shape:
        return replace(super().shape(source), masked=self.axes)

    def problems(self, source: Shape, teacher: Shape | None) -> Iterator[str]:
        if self.method != "magnitude":
            yield from term_problems(self.terms, source, teacher)


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
            mask.register_hook(self._adding(buffer, mask.detach(), score))

    def _adding(self, buffer: str, mask: Tensor, score: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor], None]:
        def add(grad: Tensor) -> None:
            getattr(self, buffer).add_(score(mask, grad))

        return add

    def values(self) -> dict[str, Tensor]:
        """The sums, by axis."""
        return {name.replace("/", "."): buffer for name, buffer in self.named_buffers()}
