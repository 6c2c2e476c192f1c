"""Learn masks or compute scores that tell which units (heads, FFN neurons, hidden dimensions) of a model matter.

``learned`` (SIMPLE, Tao et al. 2023, section 3.1) trains masks from 1. The baselines leave masks at 1 and score units:
``magnitude`` by the L2 norm of a unit's weights, ``loss_aware`` by the summed |m dL/dm|, ``movement`` by the summed
-m dL/dm while the weights train.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from compress.distributed import collectives
from compress.errors import ModelError
from compress.functional import importance
from compress.models.family import ModelFamily
from compress.models.structure import MASKS, AxisKind, sized_axes, stock_tensors
from compress.surgery.coverage import Coverage
from compress.surgery.masks import attach, detach, kind_problems, masks_of
from compress.surgery.units import unit_weights
from compress.terms.mask_l1 import MaskL1
from compress.training.config import Group
from compress.training.loop import Trained
from compress.training.objective import LossTerm

Method = Literal["learned", "magnitude", "loss_aware", "movement"]


class Trainer(Protocol):
    """Runs the training loop on a masked model."""

    def __call__(
        self,
        changes: Mapping[str, Any],
        groups: Mapping[Group, Sequence[nn.Parameter]],
        extra: nn.Module | None,
    ) -> Trained:
        """Train with these changes to the training configuration."""
        ...


def unit_values(
    model: nn.Module,
    family: ModelFamily,
    axes: Sequence[AxisKind],
    method: Method,
    *,
    weights_lr: float | None = None,
    device: str | torch.device = "cpu",
    trainer: Trainer | None = None,
) -> tuple[dict[str, Tensor], Coverage, dict[str, float]]:
    """Return a dict from axis (prunable dimension) to one mask value or score per unit.

    The model has no masks afterwards. The weights train only if ``weights_lr`` is given; otherwise they are frozen.

    Args:
        model: a transformers model; this sets ``requires_grad`` of its parameters.
        family: the family of the model, which describes its architecture.
        axes: kinds of axes to mask.
        method: how values are computed.
        weights_lr: learning rate of the weights, or None to freeze them.
        device: where scores are summed.
        trainer: runs the training loop; not needed for ``magnitude``.

    Returns:
        The values, the coverage (which counts axes as modules and units as parameters), and the training metrics.

    Raises:
        ModelError: the model has no axis of one of these kinds.
    """
    model.requires_grad_(weights_lr is not None)
    for problem in kind_problems(axes, sized_axes(model, family)):
        raise ModelError(problem)
    attach(model, family, axes)
    try:
        metrics: dict[str, float] = {}
        if method == "magnitude":
            masked = [axis for axis in sized_axes(model, family) if axis.name in masks_of(model)]
            values = {axis.name: importance.magnitude(unit_weights(model, axis)) for axis in masked}
        else:
            assert trainer is not None, "every method but magnitude trains"
            values, metrics = _trained(model, method, weights_lr, device, trainer)
        coverage = _coverage(model, family, values)
    finally:
        detach(model)
    return values, coverage, metrics


def used_terms(terms: Sequence[LossTerm], method: Method) -> list[LossTerm]:
    """Return the terms that the method uses: without ``mask_l1`` if masks stay at 1, where it is a constant."""
    return [term for term in terms if method == "learned" or not isinstance(term, MaskL1)]


def _trained(
    model: nn.Module, method: Method, weights_lr: float | None, device: str | torch.device, trainer: Trainer
) -> tuple[dict[str, Tensor], dict[str, float]]:
    masks = masks_of(model)
    scores = None if method == "learned" else _Scores(masks, method).to(device)
    # keep the last masks: sparsity grows while the quality in evaluations falls
    changes = {"keep": "last", "lr": weights_lr or 0.0} | ({} if scores is None else {"mask_lr": 0.0})
    groups: dict[Group, list[nn.Parameter]] = {
        "masks": list(masks.values()),
        "weights": [weight for name, weight in model.named_parameters() if not name.startswith(MASKS)],
    }
    trained = trainer(changes, groups, scores)
    if scores is None:
        return {axis: mask.detach() for axis, mask in masks.items()}, trained.metrics
    return scores.values(), trained.metrics


def _coverage(model: nn.Module, family: ModelFamily, values: Mapping[str, Tensor]) -> Coverage:
    axes = sized_axes(model, family)
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
    """Scores summed over batches from the gradients of masks that stay at 1. Checkpoints contain them."""

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
        """Return a dict from axis name to the sums. If some are negative, all are shifted so that the lowest is 0."""
        sums = {name.replace("/", "."): buffer for name, buffer in self.named_buffers()}
        lowest = min(0.0, *(total.min().item() for total in sums.values()))
        return {axis: total - lowest for axis, total in sums.items()}
