"""Check the models that callers pass, and record on a pruned model which parts of the original model (root) it kept."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from compress.errors import ModelError, located
from compress.models import family_of
from compress.models.bnb import bitsandbytes_products
from compress.models.family import ModelFamily
from compress.models.structure import MASKS, sized_axes
from compress.surgery.cut import compose
from compress.surgery.layers import renumbered
from compress.surgery.quantization import Product, Table
from compress.training.forward import Side

ANCESTRY = "compress_ancestry"
"""Attribute of a pruned model: an :class:`Ancestry`. Copies of the model keep it; ``save_pretrained`` ignores it."""


@dataclass(frozen=True)
class Ancestry:
    """The original model (root) of a pruned model: its number of units per axis, and the units and layers left.

    An axis is a prunable dimension, such as the heads of a layer.
    """

    sizes: Mapping[str, int]
    kept: Mapping[str, list[int]] = field(default_factory=dict)
    layers: Mapping[str, list[int]] = field(default_factory=dict)


def ancestry_of(model: nn.Module, family: ModelFamily) -> Ancestry:
    """Return the ancestry recorded on the model. A model that was never pruned is its own root."""
    known = getattr(model, ANCESTRY, None)
    if isinstance(known, Ancestry):
        return known
    quantized = "quantized" in traits_of(model)  # such a model was opened from a directory; its config has the sizes
    axes = family.axes(model.config) if quantized else sized_axes(model, family)
    return Ancestry({axis.name: axis.size for axis in axes})


def remember(model: nn.Module, known: Ancestry) -> None:
    """Record on a model what it kept of its root, before its tensors change."""
    setattr(model, ANCESTRY, known)


def remember_cut(model: nn.Module, before: Ancestry, keep: Mapping[str, Any]) -> None:
    """Record on a pruned model which units of its root are left."""
    kept = {axis: units.tolist() for axis, units in compose(before.kept, keep).items()}
    remember(model, Ancestry(before.sizes, kept, before.layers))


def remember_layers(model: nn.Module, family: ModelFamily, before: Ancestry, keep: Mapping[str, Sequence[int]]) -> None:
    """Record on a model that lost layers which layers of its root are left."""
    layers = {stack: left.tolist() for stack, left in compose(before.layers, keep).items()}
    sizes, kept = renumbered(family, before.sizes, keep), renumbered(family, before.kept, keep)
    remember(model, Ancestry(sizes, kept, layers))


def checked(model: Any, name: str = "model", *, forbids: Sequence[str] = ()) -> ModelFamily:
    """Check that a transformers model is supported and has a language-model head, and return its family.

    Args:
        model: the caller's argument.
        name: the name of the argument, for messages.
        forbids: traits that the model must not have, such as ``masked`` and ``quantized``.

    Raises:
        ModelError: it is no transformers model, its family is not supported, its parameters are not float32 or not on
            one device, or it has a forbidden trait.
    """
    if hasattr(model, "_orig_mod"):
        raise ModelError(f"{name}: is compiled by torch.compile; give the original model (model._orig_mod)")
    config = getattr(model, "config", None)
    if not isinstance(model, nn.Module) or config is None:
        raise ModelError(f"{name}: expected a transformers model such as GPT2LMHeadModel, got {type(model).__name__}")
    with located(name):
        family = family_of(config)
    if any(not _has(model, path) for path in (family.body, family.head, *family.embeddings)):
        raise ModelError(
            f"{name}: {type(model).__name__} has no language-model head at {family.head!r}; give the class with one"
        )
    if bitsandbytes_products(model):
        raise ModelError(f"{name}: is quantized by bitsandbytes; give the model before quantization")
    devices = sorted({str(each.device) for each in model.parameters()})
    if len(devices) > 1 or devices == ["meta"]:
        raise ModelError(f"{name}: has parameters on {' and '.join(devices)}; give a model with all on one device")
    narrow = next((each.dtype for each in model.parameters() if each.dtype != torch.float32), None)
    if narrow is not None:
        raise ModelError(f"{name}: has parameters of {narrow}; give a float32 model (model.float())")
    if found := sorted(traits_of(model) & set(forbids)):
        raise ModelError(f"{name}: is {' and '.join(found)} already; give the model before that")
    return family


def traits_of(model: nn.Module) -> frozenset[str]:
    """Return the traits of a model in memory: some of ``masked``, ``quantized`` and ``pruned``."""
    quantized = any(isinstance(module, Product | Table) for module in model.modules())
    known = getattr(model, ANCESTRY, None)
    pruned = isinstance(known, Ancestry) and bool(known.kept)
    found = {"masked": hasattr(model, MASKS), "quantized": quantized, "pruned": pruned}
    return frozenset(name for name, holds in found.items() if holds)


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model."""
    return next(model.parameters()).device


def side_of(model: nn.Module, family: ModelFamily) -> Side:
    """Return a model for the training objective, with the units and layers of its original model (root) it kept."""
    known = ancestry_of(model, family)
    return Side(model, family, known.kept, known.layers)


@contextmanager
def undisturbed(*models: nn.Module | None) -> Iterator[None]:
    """Restore afterwards everything about these models that the block changes, except their weights.

    That is the device, the mode of every module, ``requires_grad`` and earlier gradients of every parameter, the list
    of keys that saving ignores, and the random state of Python and torch.
    """
    given = [model for model in models if model is not None]
    places = [(model, device_of(model)) for model in given]
    modes = [(module, module.training) for model in given for module in model.modules()]
    gradients = [(each, each.requires_grad, each.grad) for model in given for each in model.parameters()]
    ignored = [(model, model.__dict__.get(_IGNORED, _IGNORED)) for model in given]
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    state = random.getstate()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(state)
        for model, device in places:
            if device_of(model) != device:
                model.to(device)
        for module, mode in modes:
            module.training = mode
        for parameter, requires, gradient in gradients:
            parameter.requires_grad_(requires)
            parameter.grad = gradient
        for model, keys in ignored:
            if keys is _IGNORED:
                model.__dict__.pop(_IGNORED, None)
            else:
                model.__dict__[_IGNORED] = keys


_IGNORED = "_keys_to_ignore_on_save"


def _has(model: nn.Module, path: str) -> bool:
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True
