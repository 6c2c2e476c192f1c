"""How the transformers modules lay out their tensors, so that other packages need no class checks."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from compress.errors import ModelError

LENGTH_DEPENDENT = ("dynamic", "longrope")
"""Kinds of rotary positions whose frequencies change with the length of the text."""


def is_product(module: nn.Module) -> bool:
    """Return True for a linear layer: a matrix product with an optional bias."""
    return isinstance(module, nn.Linear | Conv1D)


NormKind = Literal["layer", "rms"]


def norm_kind(module: nn.Module) -> NormKind | None:
    """Say if a module is layer or RMS normalization (x / sqrt(mean(x^2) + epsilon) times a weight); None for others.

    Transformers defines a separate RMS normalization class for each model that uses it.
    """
    if isinstance(module, nn.LayerNorm):
        return "layer"
    own = dict(module.named_parameters(recurse=False))
    is_rms = type(module).__name__.endswith("RMSNorm") and list(own) == ["weight"] and own["weight"].ndim == 1
    return "rms" if is_rms else None


def is_norm(module: nn.Module) -> bool:
    """Return True for a layer or RMS normalization."""
    return norm_kind(module) is not None


def norm_epsilon(module: Any) -> float:
    """Return the epsilon that a normalization adds to the variance."""
    return float(module.eps if hasattr(module, "eps") else module.variance_epsilon)


def is_embedding(module: nn.Module) -> bool:
    """Return True for a table of rows looked up by index."""
    return isinstance(module, nn.Embedding)


def is_rotary(module: nn.Module) -> bool:
    """Return True for a module that holds the frequencies of rotary positions."""
    return isinstance(getattr(module, "inv_freq", None), Tensor)


def out_first(module: nn.Module) -> bool:
    """Return True where a linear layer stores its weight as [out, in], False for [in, out]."""
    return not isinstance(module, Conv1D)


def weight_of(module: nn.Module) -> Tensor:
    """Return the weight of a linear layer as a view [out, in]."""
    weight: Tensor = module.get_parameter("weight")
    return weight if out_first(module) else weight.T


def outputs_of(module: nn.Module) -> int:
    """Return the output channels of a linear layer. A quantized one always holds its weight as [out, in]."""
    weight: Any = weight_of(module) if is_product(module) else module.weight
    return int(weight.shape[0])


def slot_dims(module: nn.Module, side: Literal["in", "out"]) -> list[tuple[str, int]]:
    """Return the (parameter, dimension) pairs that one side (``in`` or ``out``) of a module spans.

    Raises ModelError for a side that a module does not have, such as the input of an embedding.
    """
    if is_product(module):
        weight = ("weight", int((side == "in") == out_first(module)))
    elif is_embedding(module) and side == "out":
        weight = ("weight", 1)
    elif is_norm(module) and side == "out":
        weight = ("weight", 0)
    else:
        raise ModelError(f"{type(module).__name__} has no {side!r} dimension that can be pruned")
    has_bias = side == "out" and getattr(module, "bias", None) is not None
    return [weight, ("bias", 0)] if has_bias else [weight]


def refresh_sizes(module: Any) -> None:
    """Update the sizes that a linear layer, embedding or normalization caches to match its weight."""
    if isinstance(module, Conv1D):
        module.nx, module.nf = module.weight.shape
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = module.weight.shape
    elif isinstance(module, nn.LayerNorm):
        module.normalized_shape = tuple(module.weight.shape)


def rotary_tables(module: Any) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines of every position, each [context, head size / 2] in float32.

    Row p holds s cos(p f) or s sin(p f) for the frequencies f of the module and its ``attention_scaling`` s, computed
    as the transformers module computes them (Su et al. 2021, arXiv 2104.09864).

    Raises:
        ModelError: the frequencies depend on the length of the text, so no table holds them.
    """
    kind = module.rope_type
    if kind in LENGTH_DEPENDENT:
        raise ModelError(f"rope_type {kind!r} cannot be exported: its frequencies depend on the length of the text")
    positions = torch.arange(module.max_seq_len_cached, dtype=torch.float32)
    angles = torch.outer(positions, module.inv_freq.detach().float().cpu())
    return angles.cos() * module.attention_scaling, angles.sin() * module.attention_scaling
