"""A transformer as a chain of blocks, as data: what a graph builder has to know beyond the tensors.

Pre- and post-normalized stacks are the same chain: a normalization before each block and one at the end. They differ
in what the residual stream carries on, the sum (pre) or the normalized sum (post).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from compress.errors import ModelError


@dataclass(frozen=True)
class AttentionBlock:
    """Self-attention: ``qkv`` is one fused product or three, ``scale`` multiplies the scores."""

    norm: str
    qkv: tuple[str, ...]
    out: str
    heads: int
    head_size: int
    scale: float


@dataclass(frozen=True)
class FeedForward:
    """Two products with an activation function, named as in the stock config, between them."""

    norm: str
    up: str
    down: str
    activation: str


Block = AttentionBlock | FeedForward


@dataclass(frozen=True)
class Stack:
    """Embeddings, a chain of blocks, a last normalization, and the head.

    A block's ``norm`` names the normalization that its input goes through.
    """

    tokens: str
    positions: str
    blocks: tuple[Block, ...]
    norm: str
    head: str
    pre_norm: bool


def _gpt2(model: nn.Module) -> Stack:
    config: Any = model.config
    blocks: list[Block] = []
    for index in range(config.n_layer):
        layer = f"transformer.h.{index}"
        attention: Any = model.get_submodule(f"{layer}.attn")
        scale = attention.head_dim**-0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            scale /= index + 1
        heads, size = attention.num_heads, attention.head_dim
        qkv, out = (f"{layer}.attn.c_attn",), f"{layer}.attn.c_proj"
        blocks.append(AttentionBlock(f"{layer}.ln_1", qkv, out, heads, size, scale))
        up, down = f"{layer}.mlp.c_fc", f"{layer}.mlp.c_proj"
        blocks.append(FeedForward(f"{layer}.ln_2", up, down, config.activation_function))
    return Stack(
        tokens="transformer.wte",
        positions="transformer.wpe",
        blocks=tuple(blocks),
        norm="transformer.ln_f",
        head="lm_head",
        pre_norm=True,
    )


_DECODERS: dict[str, Callable[[nn.Module], Stack]] = {"gpt2": _gpt2}


def decoder(model: nn.Module) -> Stack:
    """The decoder of a causal model; ModelError for a family that has no such description."""
    config: Any = model.config
    require_described(config)
    return _DECODERS[config.model_type](model)


def require_described(config: Any) -> None:
    """Raise ModelError for a model type without a description."""
    if config.model_type not in _DECODERS:
        raise ModelError(f"model_type {config.model_type!r} has no decoding graph; allowed: {', '.join(_DECODERS)}")


def activation_name(config: Any) -> str:
    """The activation function of the feed-forward blocks, by its stock name."""
    return str(config.activation_function)
