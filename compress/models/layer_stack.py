"""A stack of layers as data: the roles of its modules, and the fields of the stock config that hold its sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from compress.models.layout import outputs_of


@dataclass(frozen=True)
class AttentionTable:
    """One attention of a layer. Module names are relative to the layer. ``axis`` is the name of its heads axis.

    If one fused product computes query, key and value, its name is given three times.
    """

    module: str
    query: str
    key: str
    value: str
    out: str
    norm: str
    axis: str = "heads"
    causal: bool = True
    cross: bool = False

    @property
    def fused(self) -> bool:
        """Whether one product computes query, key and value, in this order."""
        return self.query == self.key

    def head_counts(self, layer: nn.Module, size: int) -> tuple[int, int]:
        """Query heads and key/value heads of ``size`` channels, as the tensors of a layer have them."""
        parts = 3 if self.fused else 1
        query, key = (outputs_of(layer.get_submodule(name)) for name in (self.query, self.key))
        return query // (parts * size), key // (parts * size)


@dataclass(frozen=True)
class FeedForwardTable:
    """The FFN of a layer: its normalization and products, relative to the layer. ``gate`` is empty without a gate."""

    norm: str
    up: str
    down: str
    gate: str = ""


@dataclass(frozen=True)
class LayerStack:
    """A chain of layers of one kind: its modules, and the config fields with its sizes."""

    name: str
    layers: str
    """Path of the list of modules."""
    axes: str
    """Prefix of the axis names of layer N, before ``.N.``."""
    fields: tuple[str, ...]
    """Config fields that hold the number of layers."""
    heads: str
    """Config field with the number of query heads."""
    ffn: str
    """Config field with the number of FFN neurons. If the field is None, there are four times the hidden size."""
    tokens: str
    """Path of the token embedding."""
    attentions: tuple[AttentionTable, ...]
    feed_forward: FeedForwardTable
    kv_heads: str = ""
    """Config field with the number of key/value heads. Empty if there are as many as query heads."""
    positions: str = ""
    """Path of the table of learned positions. Empty if there is none."""
    position_offset: int = 0
    """Row of that table for position 0."""
    rotary: str = ""
    """Path of the module with the frequencies of rotary positions. Empty if there is none."""
    rotary_settings: tuple[str, ...] = ()
    """Config fields that may hold the rotary settings. The name depends on the version of the stock library."""
    embedding_norm: str = ""
    """Path of the normalization of the embeddings. Empty if there is none."""
    final_norm: str = ""
    """Path of the normalization after the last layer. Empty if that layer already ends with one."""

    def depth(self, config: Any) -> int:
        """The number of layers of this stack in a stock config."""
        return int(getattr(config, self.fields[0]))

    def layer_of(self, axis: str) -> int | None:
        """The layer that an axis belongs to. None if the axis belongs to another stack or to no stack."""
        if not axis.startswith(f"{self.axes}."):
            return None
        return int(axis.removeprefix(f"{self.axes}.").partition(".")[0])
