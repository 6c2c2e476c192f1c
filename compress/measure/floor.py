"""Approximate lower bound on the time of a token: bytes of weights that it reads / memory bandwidth.

Weights count in their stored size, and caches are not counted. A runtime that unpacks its weights is far above this
bound.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from compress.models.description import AttentionBlock, Block, CrossAttention, describe


def model_step_bytes(model: nn.Module) -> int:
    """Return the bytes of a torch model that one more token reads: the decoder's weights, and a row of each embedding.

    A tied head is read completely, in addition to that row. The key and value projections of an encoder's states run
    once per text, so they do not count.
    """
    stack = describe(model).decoder
    names = [stack.head, stack.norm, *(name for block in stack.blocks for name in _modules(block))]
    parameters = (tensor for name in names for tensor in model.get_submodule(name).parameters())
    read: dict[int, Tensor] = {id(tensor): tensor for tensor in parameters}
    if stack.logits_bias:
        bias = model.get_buffer(stack.logits_bias)
        read[id(bias)] = bias
    rows = [_table(model, name)[0] for name in (stack.tokens, stack.positions) if name]
    return sum(tensor.numel() * tensor.element_size() for tensor in (*read.values(), *rows))


def _table(model: nn.Module, name: str) -> Tensor:
    module: Any = model.get_submodule(name)
    weight: Tensor = module.weight
    return weight


def _modules(block: Block) -> tuple[str, ...]:
    if isinstance(block, AttentionBlock):
        return block.norm, *block.qkv, block.out
    if isinstance(block, CrossAttention):
        return block.norm, block.query, block.out
    return tuple(name for name in (block.norm, block.gate, block.up, block.down) if name)
