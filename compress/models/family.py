"""A model family as data: the fields of the transformers config that hold its sizes, and the roles of its modules.

Everything else is derived from these tables: the prunable dimensions (axes: heads, FFN neurons, ...) and the tensor
dimensions that shrink with them, attentions, the transformers config of a cut model, the sizes that modules cache, and
the description that graphs are built from. Each family is one file in :mod:`compress.models.families`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from compress.errors import ModelError
from compress.models.structure import (
    Attention,
    AttentionTable,
    Axis,
    FeedForwardTable,
    LayerStack,
    Projection,
    Slot,
    Task,
    common,
    with_fields,
)


@dataclass(frozen=True)
class ModelFamily:
    """A model family as a table. Paths are dotted module names of the transformers model; fields are config fields."""

    name: str
    model_types: tuple[str, ...]
    task: Task
    body: str
    head: str
    embeddings: tuple[str, ...]
    """Every token embedding. Several may share one parameter with each other and with the head."""
    final_states: str
    """Attribute of the body's output that holds the hidden states of every layer, for hidden-state losses."""
    stacks: tuple[LayerStack, ...]
    """Stacks of layers in execution order. The last one produces the final states."""
    pre_norm: bool
    """True if a block normalizes its input (the residual stream carries sums), false if it normalizes the sum."""
    hidden: str
    """Field with the hidden size."""
    context: str
    """Field with the number of positions."""
    activation: str
    """Field with the name of the activation function of the FFN."""
    special_tokens: Mapping[str, str]
    """Special tokens of a tokenizer trained from scratch. Their ids count up from 0 in this order."""
    head_size: str = ""
    """Field with the channels of a head. Empty if they are the hidden size divided by the number of query heads."""
    scales_scores: str = ""
    """Field that is false if attention scores are not divided by the square root of the head size."""
    scales_by_layer: str = ""
    """Field that is true if attention scores are also divided by the layer number, counted from 1."""
    scales_embedding: str = ""
    """Field that is true if token embeddings are multiplied by the square root of the hidden size."""
    logits_bias: str = ""
    """Buffer that is added to the logits."""
    refused: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Allowed values of fields that a config may have. Others are refused, because they change the computation."""

    def axes(self, config: Any) -> tuple[Axis, ...]:
        """Return the prunable dimensions (axes) of a transformers model. For one that may be cut, use ``sized_axes``.

        Raises ModelError for a setting that this table does not describe.
        """
        self._require_described(config)
        inner = [
            axis for stack in self.stacks for n in range(stack.depth(config)) for axis in self._inner(config, stack, n)
        ]
        hidden = Axis("hidden", "hidden", int(getattr(config, self.hidden)), tuple(self._hidden_slots(config)))
        return (hidden, *inner)

    def attentions(self, config: Any) -> tuple[Attention, ...]:
        """Return every attention, in execution order."""
        return tuple(
            _attention(stack, n, table)
            for stack in self.stacks
            for n in range(stack.depth(config))
            for table in stack.attentions
        )

    def stock_sizes(self, config: Any, sizes: Mapping[str, int]) -> dict[str, Any] | None:
        """Return the config fields for these axis sizes, or None if the transformers classes cannot express them."""
        hidden, before = sizes["hidden"], int(getattr(config, self.hidden))
        fields: dict[str, Any] = {self.hidden: hidden}
        for stack in self.stacks:
            own = {axis: size for axis, size in sizes.items() if stack.layer_of(axis) is not None}
            now = int(getattr(config, stack.heads))
            heads = common((size for axis, size in own.items() if axis.endswith("heads")), now)
            ffn = common(
                (size for axis, size in own.items() if axis.endswith(".ffn")), self.ffn_size(config, stack, hidden)
            )
            if heads is None or ffn is None:
                return None
            if self.head_size:
                if hidden % heads and (hidden, heads) != (before, now):
                    return None  # version 5 of transformers refuses to open such a config
                fields[self.head_size] = self.channels(config, stack)
            elif hidden * now != heads * before:
                return None
            implied = getattr(config, stack.ffn) is None and ffn == 4 * hidden
            fields |= {stack.heads: heads, stack.ffn: None if implied else ffn}
            if stack.kv_heads:
                shared = int(getattr(config, stack.kv_heads))
                groups = common((size for axis, size in own.items() if axis.endswith(".groups")), shared)
                if groups is None or heads % groups:
                    return None
                fields[stack.kv_heads] = groups
        return fields

    def refresh(self, model: nn.Module) -> None:
        """Update the sizes that the family's modules cache to match their current tensors."""
        config: Any = model.config
        hidden = int(model.get_submodule(self.stacks[0].tokens).get_parameter("weight").shape[1])
        _set(model.get_submodule(self.body), embed_dim=hidden)
        for name in self.embeddings:
            _set(model.get_submodule(name), embed_scale=self.embedding_scale(config, hidden))
        for stack in self.stacks:
            size = self.channels(config, stack)
            layers: Any = model.get_submodule(stack.layers)
            for n, layer in enumerate(layers):
                _set(layer, embed_dim=hidden)
                for table in stack.attentions:
                    module = layer.get_submodule(table.module)
                    heads, groups = table.head_counts(layer, size)
                    _set(
                        module,
                        layer_idx=n,
                        embed_dim=hidden,
                        split_size=heads * size,
                        num_heads=heads,
                        num_key_value_groups=heads // groups,
                    )
                    if self.scales_by_layer:  # version 5 of transformers computes it once
                        _set(module, scaling=self.score_factor(config, stack) * self.score_scale(config, n))

    def score_factor(self, config: Any, stack: LayerStack) -> float:
        """Return the factor of the attention scores that is the same in every layer."""
        scaled = not self.scales_scores or getattr(config, self.scales_scores)
        return float(self.channels(config, stack) ** -0.5) if scaled else 1.0

    def score_divisor(self, config: Any, layer: int) -> int:
        """Return the number by which transformers divides the attention scores of layer N, due to its position."""
        return layer + 1 if self.scales_by_layer and getattr(config, self.scales_by_layer) else 1

    def score_scale(self, config: Any, layer: int) -> float:
        """Return the factor that transformers applies to the attention scores of layer N, due to its position."""
        return 1 / self.score_divisor(config, layer)

    def usual_scores(self, config: Any) -> bool:
        """Return whether attention scores are scaled in the standard way, which every attention kernel supports."""
        return self.score_divisor(config, 1) == 1 and (
            not self.scales_scores or bool(getattr(config, self.scales_scores))
        )

    def embedding_scale(self, config: Any, hidden: int) -> float:
        """Return the factor that the transformers forward pass applies to token embeddings of this hidden size."""
        return math.sqrt(hidden) if self.scales_embedding and getattr(config, self.scales_embedding) else 1.0

    def logits(self, model: nn.Module, states: Tensor) -> Tensor:
        """Apply the head of the model to final hidden states: [..., hidden] -> [..., vocabulary]."""
        logits: Tensor = model.get_submodule(self.head)(states)
        return logits + model.get_buffer(self.logits_bias) if self.logits_bias else logits

    def channels(self, config: Any, stack: LayerStack) -> int:
        """Return the number of channels per head. Cutting never changes it."""
        own = getattr(config, self.head_size, None) if self.head_size else None
        return int(own or getattr(config, self.hidden) // getattr(config, stack.heads))

    def ffn_size(self, config: Any, stack: LayerStack, hidden: int | None = None) -> int:
        """Return the number of FFN neurons of a layer."""
        return int(getattr(config, stack.ffn) or 4 * (hidden or getattr(config, self.hidden)))

    def positions(self, config: Any) -> int:
        """Return the maximum number of tokens per row."""
        return int(getattr(config, self.context))

    def final_norm(self, config: Any) -> str:
        """Return the path of the normalization whose output only the head reads."""
        stack = self.stacks[-1]
        return stack.final_norm or f"{stack.layers}.{stack.depth(config) - 1}.{stack.feed_forward.norm}"

    def closing_norm(self, config: Any) -> str | None:
        """Return the final normalization if it comes after the last layer, or None if it belongs to that layer."""
        return self.stacks[-1].final_norm or None

    def uniform_config(self, config: Any, sizes: Mapping[str, int]) -> Any | None:
        """Return a config with these axis sizes (other axes as in ``config``), or None if there is none."""
        full = {axis.name: axis.size for axis in self.axes(config)} | dict(sizes)
        fields = self.stock_sizes(config, full)
        return None if fields is None else with_fields(copy.deepcopy(config), fields)

    def _require_described(self, config: Any) -> None:
        for name, allowed in self.refused.items():
            value = getattr(config, name, allowed[0])
            if value not in allowed:
                text = " or ".join(str(each).lower() if isinstance(each, bool) else repr(each) for each in allowed)
                shown = str(value).lower() if isinstance(value, bool) else repr(value)
                raise ModelError(f"config.{name} is {shown}; only {self.name} models with {name} {text} are supported")

    def _hidden_slots(self, config: Any) -> Iterator[Slot]:
        """Yield every input or output of a module that has the width of the residual stream."""
        yield from (Slot(name, "out") for name in self.embeddings)
        for stack in self.stacks:
            yield from (Slot(name, "out") for name in (stack.positions, stack.embedding_norm) if name)
        for stack in self.stacks:
            for n in range(stack.depth(config)):
                yield from self._layer_slots(stack, f"{stack.layers}.{n}")
        yield from (Slot(stack.final_norm, "out") for stack in self.stacks if stack.final_norm)
        yield Slot(self.head, "in")

    def _layer_slots(self, stack: LayerStack, layer: str) -> Iterator[Slot]:
        """Yield those of one layer, in a fixed order: unit scores are summed in it, which decides their last bits."""
        tables: list[AttentionTable | FeedForwardTable] = [*stack.attentions, stack.feed_forward]
        blocks = [_inputs_and_outputs(table) for table in tables]
        if self.pre_norm:
            for _, out, norm in blocks:
                yield from (Slot(f"{layer}.{norm}", "out"), Slot(f"{layer}.{out}", "out"))
            for inputs, _, _ in blocks:
                yield from (Slot(f"{layer}.{name}", "in") for name in inputs)
            return
        for inputs, out, norm in blocks:
            yield from (Slot(f"{layer}.{name}", "in") for name in inputs)
            yield from (Slot(f"{layer}.{out}", "out"), Slot(f"{layer}.{norm}", "out"))

    def _inner(self, config: Any, stack: LayerStack, n: int) -> Iterator[Axis]:
        layer, prefix, width = f"{stack.layers}.{n}", f"{stack.axes}.{n}", self.channels(config, stack)
        heads = int(getattr(config, stack.heads))
        for table in stack.attentions:
            name = f"{prefix}.{table.axis}"
            query, key, value, out = (f"{layer}.{part}" for part in (table.query, table.key, table.value, table.out))
            read = Slot(out, "in", width)
            if table.fused:
                yield Axis(name, "heads", heads, (Slot(query, "out", width, 3), read))
            elif stack.kv_heads:
                groups = int(getattr(config, stack.kv_heads))
                shared = tuple(Slot(part, "out", width) for part in (key, value))
                yield Axis(name, "heads", heads, (Slot(query, "out", width), read))
                yield Axis(f"{prefix}.groups", "groups", groups, shared, holds=name)
            else:
                yield Axis(name, "heads", heads, (*(Slot(part, "out", width) for part in (query, key, value)), read))
        ffn = stack.feed_forward
        ups = [Slot(f"{layer}.{part}", "out") for part in (ffn.gate, ffn.up) if part]
        yield Axis(f"{prefix}.ffn", "ffn", self.ffn_size(config, stack), (*ups, Slot(f"{layer}.{ffn.down}", "in")))


def _inputs_and_outputs(table: AttentionTable | FeedForwardTable) -> tuple[list[str], str, str]:
    """Return the modules of a block that read the residual stream, the one that writes it, and its normalization."""
    if isinstance(table, AttentionTable):
        return list(dict.fromkeys((table.query, table.key, table.value))), table.out, table.norm
    return [part for part in (table.gate, table.up) if part], table.down, table.norm


def _attention(stack: LayerStack, n: int, table: AttentionTable) -> Attention:
    names = [f"{stack.layers}.{n}.{part}" for part in (table.query, table.key, table.value)]
    query, key, value = (Projection(name, at, 3) if table.fused else Projection(name) for at, name in enumerate(names))
    axis = f"{stack.axes}.{n}.{table.axis}"
    kv_axis = f"{stack.axes}.{n}.groups" if stack.kv_heads else axis
    return Attention(axis, query, key, value, causal=table.causal, cross=table.cross, kv_axis=kv_axis)


def _set(module: Any, **values: Any) -> None:
    """Set only attributes that the module already has. Versions of transformers cache different ones."""
    for name, value in values.items():
        if hasattr(module, name):
            setattr(module, name, value)
