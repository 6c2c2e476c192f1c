"""Learn masks or compute scores that tell which units (heads, FFN neurons, hidden dimensions) of a model matter."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field
from torch import Tensor, nn

from compress.api.arguments import configured, refuse_idle, require_choice
from compress.api.asked import Asked, idle_settings
from compress.api.teaching import (
    Terms,
    read_terms,
    require_alike,
    require_teacher_read,
    require_terms,
    trains_parts,
)
from compress.api.unit_masks import Masks
from compress.engine.fitting import fit
from compress.engine.masking import Method, unit_values
from compress.engine.models import checked, side_of, undisturbed
from compress.errors import UserError
from compress.models.family import ModelFamily
from compress.models.structure import AxisKind, sized_axes
from compress.schema import Strict
from compress.training.config import Group, TrainConfig
from compress.training.loop import Trained
from compress.training.objective import LossTerm

AXES: tuple[AxisKind, ...] = ("hidden", "heads", "ffn")
"""Kinds of prunable dimensions (axes) that are masked by default: hidden dimensions, attention heads, FFN neurons."""
OF_SCORES = ("cross_entropy",)
"""The default loss terms. Units are scored by their gradients."""


def learn_masks(
    model: nn.Module,
    data: Any,
    *,
    teacher: nn.Module | None = None,
    tokenizer: Any = None,
    axes: Sequence[AxisKind] = AXES,
    terms: Terms = ("forward_kl", {"type": "mask_l1", "weight": 1e-4}),
    block: int | None = None,
    seed: int = 0,
    progress: bool = True,
    **training: Any,
) -> Masks:
    """Learn one mask per head, FFN neuron and hidden dimension under distillation and an L1 penalty.

    This is SIMPLE (Tao et al., Findings of ACL 2023, section 3.1). Masks start at 1 and train while the weights are
    frozen. The masks of the last step are returned. The model is unchanged afterwards.

    Args:
        model: a float32 model without masks and without quantization.
        data: as in :func:`compress.finetune`.
        teacher: the model to match; by default the model itself without masks. It is not changed.
        tokenizer: as in :func:`compress.finetune`.
        axes: kinds of prunable dimensions (axes) to mask: ``hidden``, ``heads``, ``ffn``.
        terms: loss terms; ``mask_l1`` is the sum of |m|.
        block: as in :func:`compress.finetune`.
        seed: as in :func:`compress.finetune`.
        progress: as in :func:`compress.finetune`.
        **training: as in :func:`compress.finetune`; ``mask_lr`` is the learning rate of the masks.

    Returns:
        The masks. :func:`prune` can cut the model to any number of sizes with them.

    Raises:
        UserError: an argument cannot be used.

    Examples:
        >>> masks = compress.learn_masks(model, train, tokenizer=tokenizer, steps=2, batch=2, progress=False)
        >>> masks.values["layer.0.heads"].shape
        torch.Size([4])
    """
    family = checked(model, "model", forbids=("masked", "quantized"))
    axes = require_axes(model, family, axes)
    used = read_terms(terms)
    if teacher is not None:
        checked(teacher, "teacher", forbids=("masked",))
        require_teacher_read(used, teacher)
    if teacher is model or (teacher is None and any(term.needs_teacher for term in used)):
        teacher = copy.deepcopy(model)
    asked = Asked(data, tokenizer, block, seed, progress, training)
    config = asked.config(idle_settings(masks=True, parts=trains_parts(used)))
    if config.mask_lr == 0:
        raise UserError("mask_lr: is 0, and no mask would train; allowed: numbers above 0")
    return Masks(_trained(model, family, axes, "learned", used, teacher, asked, config), scored=False)


def score(
    model: nn.Module,
    data: Any = None,
    *,
    method: Literal["magnitude", "loss_aware", "movement"] = "magnitude",
    teacher: nn.Module | None = None,
    tokenizer: Any = None,
    axes: Sequence[AxisKind] = AXES,
    terms: Terms = OF_SCORES,
    weights_lr: float | None = None,
    block: int | None = None,
    seed: int = 0,
    progress: bool = True,
    **training: Any,
) -> Masks:
    """Score every unit without learning masks, as the baselines of SIMPLE do. The model is unchanged.

    ``magnitude`` is the L2 norm of a unit's weights and needs no data. ``loss_aware`` sums |m dL/dm| over steps (Michel
    et al. 2019), ``movement`` sums -m dL/dm while a copy of the weights trains at ``weights_lr`` (Sanh et al. 2020).

    Args:
        model: a float32 model without masks and without quantization.
        data: as in :func:`compress.finetune`. With ``magnitude``, give neither this nor an argument below it, except
            ``axes``.
        method: how units are scored.
        teacher: the model that terms compare with; give it only if a term needs it.
        tokenizer: as in :func:`compress.finetune`.
        axes: kinds of prunable dimensions (axes) to score: ``hidden``, ``heads``, ``ffn``.
        terms: loss terms whose gradients are used.
        weights_lr: learning rate of the copy of the weights, for ``movement``.
        block: as in :func:`compress.finetune`.
        seed: as in :func:`compress.finetune`.
        progress: as in :func:`compress.finetune`.
        **training: as in :func:`compress.finetune`; ``magnitude`` does not accept it.

    Returns:
        Scores to rank units by.

    Raises:
        UserError: an argument cannot be used, or has no effect with this method.

    Examples:
        >>> compress.score(model, method="magnitude").values["hidden"].shape
        torch.Size([32])
    """
    family = checked(model, "model", forbids=("masked", "quantized"))
    axes = require_axes(model, family, axes)
    require_choice(method, "method", ("magnitude", "loss_aware", "movement"))
    asked = Asked(data, tokenizer, block, seed, progress, training)
    if method == "movement" and weights_lr is None:
        raise UserError("weights_lr: is missing; method movement trains a copy of the weights at this learning rate")
    if method != "movement" and weights_lr is not None:
        raise UserError("weights_lr: applies only to method movement; leave it out")
    if method == "magnitude":
        given = {"data": data, "teacher": teacher, "tokenizer": tokenizer, "block": block, "seed": seed or None}
        given |= {"terms": None if terms is OF_SCORES else terms, **training}
        refuse_idle(
            (name for name, value in given.items() if value is not None),
            dict.fromkeys(given, "method magnitude uses only the weights"),
        )
        with undisturbed(model):
            values, _, _ = unit_values(model, family, axes, method)
        return Masks(_plain(values), scored=True)
    used = read_terms(terms)
    if teacher is model:  # masks are attached to the model, and the teacher is frozen
        teacher = copy.deepcopy(model)
    if teacher is not None:
        checked(teacher, "teacher", forbids=("masked",))
        require_teacher_read(used, teacher)
    idle = idle_settings(weights=weights_lr is not None, parts=trains_parts(used))
    if weights_lr is not None:
        idle["lr"] = "weights train at weights_lr"
        weights_lr = configured(_Rate, weights_lr=weights_lr).weights_lr
        model = copy.deepcopy(model)
    config = asked.config(idle)
    return Masks(_trained(model, family, axes, method, used, teacher, asked, config, weights_lr), scored=True)


class _Rate(Strict):
    weights_lr: float = Field(gt=0)


def require_axes(model: nn.Module, family: ModelFamily, axes: AxisKind | Sequence[AxisKind]) -> Sequence[AxisKind]:
    """Return the kinds of axes as a sequence. Raise UserError for a kind that is repeated or that the model lacks."""
    have = list(dict.fromkeys(axis.kind for axis in sized_axes(model, family)))
    if not isinstance(axes, Sequence):
        raise UserError(f"axes: expected a list of some of {', '.join(have)}, got {type(axes).__name__}")
    names: list[str] = [axes] if isinstance(axes, str) else list(axes)
    if not names:
        raise UserError(f"axes: is empty; allowed: some of {', '.join(have)}")
    for name in names:
        if name not in have or names.count(name) > 1:
            raise UserError(f"axes: {name!r} is unknown or named twice; allowed: some of {', '.join(have)}")
    return [kind for kind in have if kind in names]


def _trained(
    model: nn.Module,
    family: ModelFamily,
    axes: Sequence[AxisKind],
    method: Method,
    used: Sequence[LossTerm],
    teacher: nn.Module | None,
    asked: Asked,
    config: TrainConfig,
    weights_lr: float | None = None,
) -> dict[str, Tensor]:
    require_terms(used, model, teacher, masked=method == "learned")
    rows, place = asked.rows(model), asked.place(model, "masks")
    if teacher is not None:
        require_alike(teacher, model, "teacher", rows)

    def trainer(
        changes: Mapping[str, Any], groups: Mapping[Group, Sequence[nn.Parameter]], extra: nn.Module | None
    ) -> Trained:
        reference = None if teacher is None else side_of(teacher.requires_grad_(False).eval(), checked(teacher))
        changed = config.model_copy(update=dict(changes))
        return fit(
            side_of(model, family), used, changed, place, data=rows, teacher=reference, groups=groups, extra=extra
        )

    with undisturbed(model, teacher):
        values, _, _ = unit_values(
            model, family, axes, method, weights_lr=weights_lr, device=place.device, trainer=trainer
        )
    return _plain(values)


def _plain(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {axis: value.detach().cpu().float().clone() for axis, value in values.items()}
