"""Key/value caches as flat lists of tensors, for graphs whose inputs and outputs must be tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache, EncoderDecoderCache


def to_cache(flat: Sequence[Tensor], *, cross: bool = False) -> Any:
    """Return a transformers cache of (key, value) per layer; (key, value, cross key, cross value) with ``cross``.

    Each tensor is [batch, heads, length, head size]. Cross keys of length 0 are computed by the next forward pass.
    Longer ones are used unchanged.
    """
    if not cross:
        return _dynamic(flat[0::2], flat[1::2])
    return EncoderDecoderCache(_dynamic(flat[0::4], flat[1::4]), _dynamic(flat[2::4], flat[3::4]))


def from_cache(cache: Any) -> list[Tensor]:
    """Return the tensors of a transformers cache, in the order that ``to_cache`` takes."""
    crossed = isinstance(cache, EncoderDecoderCache)
    parts = [cache.self_attention_cache, cache.cross_attention_cache] if crossed else [cache]
    layers = zip(*(part.layers for part in parts), strict=True)
    return [tensor for layer in layers for part in layer for tensor in (part.keys, part.values)]


def _dynamic(keys: Sequence[Tensor], values: Sequence[Tensor]) -> Any:
    cache = DynamicCache()
    for layer, (key, value) in enumerate(zip(keys, values, strict=True)):
        cache.update(key, value, layer)
    return cache
