"""A transformer as a chain of blocks, as data: what a graph builder has to know beyond the tensors.

Pre- and post-normalized stacks are the same chain: a normalization before each block and one at the end. They differ
in what the residual stream carries on, the sum (pre) or the normalized sum (post).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from compress.errors import ModelError


@dataclass(frozen=True)
class AttentionBlock:
    """Self-attention: ``qkv`` is one fused product or three, ``scale`` multiplies the scores.

    ``kv_heads`` is the number of key/value heads: ``heads``, or a divisor of it where neighbouring query heads share
    one (grouped-query attention).
    """

    norm: str
    qkv: tuple[str, ...]
    out: str
    heads: int
    kv_heads: int
    head_size: int
    scale: float


@dataclass(frozen=True)
class FeedForward:
    """Two products with an activation function, named as in the stock config, between them.

    With a ``gate``, the activation function takes the gate's output, which then multiplies that of ``up``.
    """

    norm: str
    up: str
    down: str
    activation: str
    gate: str = ""


@dataclass(frozen=True)
class CrossAttention:
    """Attention of a decoder over the states of an encoder."""

    norm: str
    query: str
    key: str
    value: str
    out: str
    heads: int
    head_size: int
    scale: float


Block = AttentionBlock | CrossAttention | FeedForward


@dataclass(frozen=True)
class Stack:
    """Embeddings, a chain of blocks, a last normalization, and the head (none for an encoder).

    A block's ``norm`` names the normalization that its input goes through. ``token_scale`` multiplies the rows of
    ``tokens``; position p reads row p + ``position_offset`` of ``positions`` (empty: no learned positions);
    ``rotary`` names the module with the frequencies of rotary positions (empty: none); ``embedding_norm`` normalizes
    the embeddings of a pre-normalized stack before its first block (empty: nothing does); the buffer ``logits_bias``
    is added to the logits.
    """

    tokens: str
    positions: str
    blocks: tuple[Block, ...]
    norm: str
    head: str
    pre_norm: bool
    token_scale: float = 1.0
    position_offset: int = 0
    logits_bias: str = ""
    embedding_norm: str = ""
    rotary: str = ""

    @property
    def attentions(self) -> list[AttentionBlock]:
        """The self-attentions, in order."""
        return [block for block in self.blocks if isinstance(block, AttentionBlock)]

    @property
    def crossings(self) -> list[CrossAttention]:
        """The cross-attentions, in order."""
        return [block for block in self.blocks if isinstance(block, CrossAttention)]


@dataclass(frozen=True)
class Description:
    """The stacks of a model; ``encoder`` is None where there is a decoder alone."""

    decoder: Stack
    encoder: Stack | None = None


def _gpt2(model: nn.Module) -> Description:
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
        blocks.append(AttentionBlock(f"{layer}.ln_1", qkv, out, heads, heads, size, scale))
        up, down = f"{layer}.mlp.c_fc", f"{layer}.mlp.c_proj"
        blocks.append(FeedForward(f"{layer}.ln_2", up, down, config.activation_function))
    decoder = Stack(
        tokens="transformer.wte",
        positions="transformer.wpe",
        blocks=tuple(blocks),
        norm="transformer.ln_f",
        head="lm_head",
        pre_norm=True,
    )
    return Description(decoder)


def _bart(model: nn.Module) -> Description:
    return Description(decoder=_bart_stack(model, "decoder"), encoder=_bart_stack(model, "encoder"))


def _bart_stack(model: nn.Module, side: Literal["encoder", "decoder"]) -> Stack:
    config: Any = model.config
    stack: Any = model.get_submodule(f"model.{side}")
    norm = f"model.{side}.layernorm_embedding"
    blocks: list[Block] = []
    for index, layer in enumerate(stack.layers):
        name = f"model.{side}.layers.{index}"
        for attention in ("self_attn", "encoder_attn") if side == "decoder" else ("self_attn",):
            module: Any = getattr(layer, attention)
            query, key, value, out = (f"{name}.{attention}.{part}_proj" for part in ("q", "k", "v", "out"))
            sizes = module.num_heads, module.head_dim, module.head_dim**-0.5
            if attention == "self_attn":
                blocks.append(AttentionBlock(norm, (query, key, value), out, module.num_heads, *sizes))
            else:
                blocks.append(CrossAttention(norm, query, key, value, out, *sizes))
            norm = f"{name}.{attention}_layer_norm"
        blocks.append(FeedForward(norm, f"{name}.fc1", f"{name}.fc2", config.activation_function))
        norm = f"{name}.final_layer_norm"
    tokens: Any = stack.embed_tokens
    return Stack(
        tokens=f"model.{side}.embed_tokens",
        positions=f"model.{side}.embed_positions",
        blocks=tuple(blocks),
        norm=norm,
        head="lm_head" if side == "decoder" else "",
        pre_norm=False,
        token_scale=math.sqrt(tokens.weight.shape[1]) if config.scale_embedding else 1.0,
        position_offset=stack.embed_positions.offset,
        logits_bias="final_logits_bias" if side == "decoder" else "",
    )


_DESCRIPTIONS: dict[str, Callable[[nn.Module], Description]] = {"gpt2": _gpt2, "bart": _bart}


def describe(model: nn.Module) -> Description:
    """The stacks of a model; ModelError for a family that has no such description."""
    config: Any = model.config
    require_described(config)
    return _DESCRIPTIONS[config.model_type](model)


def require_described(config: Any) -> None:
    """Raise ModelError for a model type without a description."""
    if config.model_type not in _DESCRIPTIONS:
        raise ModelError(f"model_type {config.model_type!r} has no decoding graph; allowed: {', '.join(_DESCRIPTIONS)}")


def activation_name(config: Any) -> str:
    """The activation function of the feed-forward blocks, by its stock name."""
    return str(config.activation_function)
