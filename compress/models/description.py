"""Describe a transformer as a chain of blocks, in data. A graph builder needs only this and the tensors.

A stack is an encoder or a decoder. Pre- and post-normalized stacks form the same chain: a normalization before each
block and one at the end. They differ in what the residual stream carries: the sum (pre) or the normalized sum (post).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from compress.errors import ModelError
from compress.models import family_of
from compress.models.family import ModelFamily
from compress.models.layout import LENGTH_DEPENDENT
from compress.models.structure import AttentionTable, LayerStack


@dataclass(frozen=True)
class AttentionBlock:
    """Self-attention. ``qkv`` names one fused linear layer or three linear layers, and ``scale`` multiplies the scores.

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
    """Two linear layers with an activation function between them, named as in the transformers config.

    With a ``gate``, the activation function is applied to the gate's output, and the result multiplies that of ``up``.
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
    ``tokens``; position p reads row p + ``position_offset`` of ``positions``; ``rotary`` names
    the module with the frequencies of rotary positions; ``embedding_norm`` normalizes the embeddings of a
    pre-normalized stack before its first block; the buffer ``logits_bias`` is added to the logits. A name is empty if
    the stack has no such module.
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
    """The stacks of a model. ``encoder`` is None for a decoder-only model."""

    decoder: Stack
    encoder: Stack | None = None


def describe(model: nn.Module) -> Description:
    """Return the stacks of a model. The model may have a shape that no transformers config can express.

    Raises ModelError for a setting that graphs cannot compute.
    """
    config: Any = model.config
    require_described(config)
    family = family_of(config)
    stacks = {stack.name: _stack(model, family, stack) for stack in family.stacks}
    decoder = stacks.pop(family.stacks[-1].name)
    return Description(decoder, next(iter(stacks.values()), None))


def require_described(config: Any) -> None:
    """Raise ModelError for a model whose rotary frequencies change with the length of a row."""
    for stack in family_of(config).stacks:
        if (kind := rotary_kind(config, stack)) in LENGTH_DEPENDENT:
            raise ModelError(
                f"rotary positions of type {kind!r} cannot be exported to ONNX, because they change with the length of "
                "a row"
            )


def rotary_kind(config: Any, stack: LayerStack) -> str:
    """Return the type of a stack's rotary positions: "default" if the config does not say, or if the stack has none."""
    for name in stack.rotary_settings:
        settings = getattr(config, name, None)
        if isinstance(settings, dict) and (kind := settings.get("rope_type", settings.get("type"))):
            return str(kind)
    return "default"


def activation_name(config: Any) -> str:
    """Return the activation function of the feed-forward blocks, by its name in transformers."""
    return str(getattr(config, family_of(config).activation))


def _stack(model: nn.Module, family: ModelFamily, stack: LayerStack) -> Stack:
    config: Any = model.config
    blocks: list[Block] = []
    norms: list[str] = []  # those of post-normalized blocks
    for n in range(len(model.get_submodule(stack.layers))):  # type: ignore[arg-type]
        layer = f"{stack.layers}.{n}"
        for table in stack.attentions:
            blocks.append(_attention(model, family, stack, table, n))
            norms.append(f"{layer}.{table.norm}")
        ffn = stack.feed_forward
        gate = f"{layer}.{ffn.gate}" if ffn.gate else ""
        blocks.append(FeedForward("", f"{layer}.{ffn.up}", f"{layer}.{ffn.down}", activation_name(config), gate))
        norms.append(f"{layer}.{ffn.norm}")
    before = norms if family.pre_norm else [stack.embedding_norm, *norms[:-1]]
    is_decoder = stack is family.stacks[-1]
    width = model.get_submodule(stack.tokens).get_parameter("weight").shape[1]
    return Stack(
        tokens=stack.tokens,
        positions=stack.positions,
        blocks=tuple(replace(block, norm=norm) for block, norm in zip(blocks, before, strict=True)),
        norm=stack.final_norm if family.pre_norm else norms[-1],
        head=family.head if is_decoder else "",
        pre_norm=family.pre_norm,
        token_scale=family.embedding_scale(config, width),
        position_offset=stack.position_offset,
        logits_bias=family.logits_bias if is_decoder else "",
        embedding_norm=stack.embedding_norm if family.pre_norm else "",
        rotary=stack.rotary,
    )


def _attention(
    model: nn.Module, family: ModelFamily, stack: LayerStack, table: AttentionTable, n: int
) -> AttentionBlock | CrossAttention:
    config: Any = model.config
    size = family.channels(config, stack)
    query, key, value, out = (f"{stack.layers}.{n}.{name}" for name in (table.query, table.key, table.value, table.out))
    heads, kv_heads = table.head_counts(model.get_submodule(f"{stack.layers}.{n}"), size)
    scale = family.score_factor(config, stack) / family.score_divisor(config, n)
    if table.cross:
        return CrossAttention("", query, key, value, out, heads, size, scale)
    qkv = (query,) if table.fused else (query, key, value)
    return AttentionBlock("", qkv, out, heads, kv_heads, size, scale)
