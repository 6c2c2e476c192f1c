"""About the least time of a token: bytes of weights that it reads / bandwidth of memory, as far as that is known.

Weights count as they are stored and caches are left out, so that a runtime which unpacks its weights stays far above.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from compress.models.description import AttentionBlock, Block, CrossAttention, describe


def model_step_bytes(model: nn.Module) -> int:
    """Bytes of a torch model that one more token reads: the decoder's weights once, and a row of each embedding.

    A tied head is read whole beside that row. Keys and values of an encoder's states are projected once for a text,
    and do not count.
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
