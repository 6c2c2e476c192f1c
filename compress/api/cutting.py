"""Learn or score which units of a model matter, and make a smaller model of those that do."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from compress.api.teaching import Asked, Terms, configured, read_terms, require_alike, require_terms
from compress.engine.fitting import fit
from compress.engine.masking import Method, unit_values, used_terms
from compress.engine.models import ancestry_of, checked, remember_cut, remember_layers, side_of, undisturbed
from compress.engine.pruning import Target, cut_to
from compress.errors import ModelError, NothingDoneError, UserError
from compress.models.family import ModelFamily
from compress.models.structure import AxisKind, sized_axes
from compress.surgery.layers import chosen, drop
from compress.surgery.mask_files import holds_scores, read_masks, write_masks
from compress.surgery.masks import attach, fold
from compress.training.config import Group
from compress.training.loop import Trained

AXES: tuple[AxisKind, ...] = ("hidden", "heads", "ffn")
"""Kinds of axes that are masked by default: the hidden dimension, attention heads, FFN neurons."""


@dataclass(frozen=True)
class Masks:
    """One value per unit of each masked axis, [units] in float32 on the CPU.

    Axes are named ``hidden``, ``layer.N.heads``, ``layer.N.ffn`` and so on. ``scored`` is true for scores to rank units
    by, false for learned masks, which :func:`prune` can also multiply into the weights.
    """

    values: Mapping[str, Tensor]
    scored: bool

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, as a recipe's ``learn_masks`` stage leaves it."""
        write_masks(path, self.values, scores=self.scored)

    @classmethod
    def load(cls, path: str | Path) -> Masks:
        """Read a file that :meth:`save` or a ``learn_masks`` stage wrote."""
        return cls(read_masks(path), holds_scores(path))


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

    SIMPLE (Tao et al., Findings of ACL 2023, section 3.1). Masks start at 1 and train while the weights are frozen; the
    masks of the last step are returned. The model is unchanged afterwards.

    Args:
        model: a float32 model without masks and without quantization.
        data: as in :func:`compress.finetune`.
        teacher: the model to match; by default the model itself, as it is without masks.
        tokenizer: as in :func:`compress.finetune`.
        axes: kinds of axes to mask: ``hidden``, ``heads``, ``ffn``.
        terms: loss terms; ``mask_l1`` is the sum of |m|.
        block: as in :func:`compress.finetune`.
        seed: as in :func:`compress.finetune`.
        progress: as in :func:`compress.finetune`.
        **training: as in :func:`compress.finetune`; ``mask_lr`` is the learning rate of the masks.

    Returns:
        The masks; one set can be cut to any number of sizes.

    Raises:
        UserError: an argument that cannot be used.

    Examples:
        >>> masks = compress.learn_masks(model, train, tokenizer=tokenizer, steps=2, batch=2, progress=False)
        >>> masks.values["layer.0.heads"].shape
        torch.Size([4])
    """
    family = checked(model, "model", forbids=("masked", "quantized"))
    axes = require_axes(model, family, axes)
    if teacher is None or teacher is model:
        teacher = copy.deepcopy(model)
    checked(teacher, "teacher", forbids=("masked",))
    asked = Asked(data, tokenizer, block, seed, progress, training)
    if asked.config().mask_lr == 0:
        raise UserError("mask_lr: is 0, so no mask would train; allowed: numbers above 0")
    return Masks(_trained(model, family, axes, "learned", terms, teacher, asked), scored=False)


def score(
    model: nn.Module,
    data: Any = None,
    *,
    method: Literal["magnitude", "loss_aware", "movement"] = "magnitude",
    teacher: nn.Module | None = None,
    tokenizer: Any = None,
    axes: Sequence[AxisKind] = AXES,
    terms: Terms = ("cross_entropy",),
    weights_lr: float | None = None,
    block: int | None = None,
    seed: int = 0,
    progress: bool = True,
    **training: Any,
) -> Masks:
    """Score every unit without learning a mask: the baselines of SIMPLE. The model is unchanged.

    ``magnitude`` is the L2 norm of a unit's weights and needs no data. ``loss_aware`` sums |m dL/dm| over steps (Michel
    et al. 2019), ``movement`` sums -m dL/dm while a copy of the weights trains at ``weights_lr`` (Sanh et al. 2020).

    Args:
        model: a float32 model without masks and without quantization.
        data: as in :func:`compress.finetune`; not for ``magnitude``.
        method: how units are scored.
        teacher: needed by terms that compare with one.
        tokenizer: as in :func:`compress.finetune`.
        axes: kinds of axes to score.
        terms: loss terms that the gradients are of.
        weights_lr: learning rate of the copy, for ``movement``.
        block: as in :func:`compress.finetune`.
        seed: as in :func:`compress.finetune`.
        progress: as in :func:`compress.finetune`.
        **training: as in :func:`compress.finetune`; not for ``magnitude``.

    Returns:
        Scores to rank units by.

    Raises:
        UserError: an argument that cannot be used, or that the method does not read.

    Examples:
        >>> compress.score(model, method="magnitude").values["hidden"].shape
        torch.Size([32])
    """
    family = checked(model, "model", forbids=("masked", "quantized"))
    axes = require_axes(model, family, axes)
    if method not in ("magnitude", "loss_aware", "movement"):
        raise UserError(f"method: {method!r} is not known; allowed: magnitude, loss_aware, movement")
    if method == "magnitude" and (data is not None or training):
        idle = "data" if data is not None else next(iter(training))
        raise UserError(f"{idle}: method magnitude reads only the weights; leave it out")
    if (method == "movement") != (weights_lr is not None):
        raise UserError("weights_lr: applies only to method movement, which follows weights during training")
    if teacher is not None:
        checked(teacher, "teacher", forbids=("masked",))
    if method == "magnitude":
        with undisturbed(model):
            values, _, _ = unit_values(model, family, axes, method)
        return Masks(_plain(values), scored=True)
    if method == "movement":
        model = copy.deepcopy(model)
    asked = Asked(data, tokenizer, block, seed, progress, training)
    return Masks(_trained(model, family, axes, method, terms, teacher, asked, weights_lr), scored=True)


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
        uniform: keep equally many units in every layer; without it units are ranked across layers.
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


def drop_layers(model: nn.Module, keep: int | Sequence[int] | Mapping[str, int | Sequence[int]]) -> Any:
    """Make a model of fewer layers. ``model`` is unchanged.

    Args:
        model: a float32 model without masks and without quantization.
        keep: a number of layers, the layers to keep (from 0, ascending), or one of these per stack, such as
            ``{"encoder": 3, "decoder": [5]}``. A number keeps the layers of DQ-BART (Li et al. 2022) for a depth of
            six, otherwise evenly spaced ones from the first to the last.

    Returns:
        The shallower model, in the mode of ``model``.

    Raises:
        UserError: layers that the model does not have.
        NothingDoneError: every layer would stay.

    Examples:
        >>> compress.drop_layers(model, 1).config.n_layer
        1
    """
    family = checked(model, "model", forbids=("masked", "quantized"))
    config: Any = model.config
    depths = {stack.name: stack.depth(config) for stack in family.stacks}
    asked = keep if isinstance(keep, Mapping) else dict.fromkeys(depths, keep)
    for each in asked.values():
        listed = isinstance(each, Sequence) and not isinstance(each, str) and all(type(layer) is int for layer in each)
        if type(each) is not int and not listed:
            raise UserError(f"keep: {each!r} is not a number of layers, or a list of layers from 0, such as [0, 2, 5]")
    if unknown := sorted(set(asked) - set(depths)):
        raise ModelError(f"keep: this model has no layers named {unknown[0]!r}; allowed: {', '.join(depths)}")
    layers = {name: chosen(each, depths[name]) if isinstance(each, int) else list(each) for name, each in asked.items()}
    if all(left == list(range(depths[name])) for name, left in layers.items()):
        raise NothingDoneError(f"keep: {keep} keeps every layer; allowed: fewer than {depths}")
    before = ancestry_of(model, family)
    small = copy.deepcopy(model)
    drop(small, family, layers)
    remember_layers(small, family, before, layers)
    return small


def require_axes(model: nn.Module, family: ModelFamily, axes: AxisKind | Sequence[AxisKind]) -> Sequence[AxisKind]:
    """The kinds of axes as a sequence; UserError for kinds that the model does not have, or that are named twice."""
    have = list(dict.fromkeys(axis.kind for axis in sized_axes(model, family)))
    names: list[str] = [axes] if isinstance(axes, str) else list(axes)
    wrong = next((name for name in names if name not in have or names.count(name) > 1), None)
    if wrong is not None or not names:
        raise UserError(f"axes: {wrong!r} is unknown or named twice; allowed: some of {', '.join(have)}")
    return [kind for kind in have if kind in names]


def _trained(
    model: nn.Module,
    family: ModelFamily,
    axes: Sequence[AxisKind],
    method: Method,
    terms: Terms,
    teacher: nn.Module | None,
    asked: Asked,
    weights_lr: float | None = None,
) -> dict[str, Tensor]:
    config, used = asked.config(), used_terms(read_terms(terms), method)
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
