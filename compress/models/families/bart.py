"""BART: encoder-decoder, post-normalization, token embeddings shared by encoder, decoder and head."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from torch import Tensor

from compress.models.structure import Attention, Axis, LayerStack, ModelFamily, Projection, Slot, common

Stack = Literal["encoder", "decoder"]
_ATTENTIONS = {"heads": "self_attn", "cross_heads": "encoder_attn"}
_EMBEDDINGS = ("model.shared", "model.encoder.embed_tokens", "model.decoder.embed_tokens")


def _layers(config: Any) -> Iterator[tuple[Stack, str, tuple[str, ...]]]:
    """Each layer's stack, its name below the body, and its attentions as named in axes."""
    for n in range(config.encoder_layers):
        yield "encoder", f"encoder.layers.{n}", ("heads",)
    for n in range(config.decoder_layers):
        yield "decoder", f"decoder.layers.{n}", ("heads", "cross_heads")


def _heads(config: Any, stack: Stack) -> int:
    return int(config.encoder_attention_heads if stack == "encoder" else config.decoder_attention_heads)


def _axes(config: Any) -> tuple[Axis, ...]:
    hidden = [Slot(name, "out") for name in _EMBEDDINGS]
    for stack in ("encoder", "decoder"):
        hidden += [Slot(f"model.{stack}.{name}", "out") for name in ("embed_positions", "layernorm_embedding")]
    inner: list[Axis] = []
    for stack, layer, attentions in _layers(config):
        prefix, name = f"model.{layer}", layer.replace("layers", "layer")
        heads = _heads(config, stack)
        width = config.d_model // heads
        for axis in attentions:
            module = f"{prefix}.{_ATTENTIONS[axis]}"
            projections = [f"{module}.{part}_proj" for part in "qkv"]
            hidden += [Slot(projection, "in") for projection in projections]
            hidden += [Slot(f"{module}.out_proj", "out"), Slot(f"{module}_layer_norm", "out")]
            slots = (*(Slot(part, "out", width) for part in projections), Slot(f"{module}.out_proj", "in", width))
            inner.append(Axis(f"{name}.{axis}", "heads", heads, slots))
        hidden += [Slot(f"{prefix}.fc1", "in"), Slot(f"{prefix}.fc2", "out"), Slot(f"{prefix}.final_layer_norm", "out")]
        ffn = config.encoder_ffn_dim if stack == "encoder" else config.decoder_ffn_dim
        inner.append(Axis(f"{name}.ffn", "ffn", ffn, (Slot(f"{prefix}.fc1", "out"), Slot(f"{prefix}.fc2", "in"))))
    hidden.append(Slot("lm_head", "in"))
    return (Axis("hidden", "hidden", config.d_model, tuple(hidden)), *inner)


def _attentions(config: Any) -> tuple[Attention, ...]:
    def attention(stack: Stack, layer: str, axis: str) -> Attention:
        query, key, value = (Projection(f"model.{layer}.{_ATTENTIONS[axis]}.{part}_proj") for part in "qkv")
        cross = axis == "cross_heads"
        name = f"{layer.replace('layers', 'layer')}.{axis}"
        return Attention(name, query, key, value, causal=stack == "decoder" and not cross, cross=cross)

    return tuple(attention(stack, layer, axis) for stack, layer, axes in _layers(config) for axis in axes)


def _stock_sizes(config: Any, sizes: Mapping[str, int]) -> dict[str, Any] | None:
    hidden = sizes["hidden"]
    fields: dict[str, Any] = {"d_model": hidden}
    for stack in ("encoder", "decoder"):
        own = {axis: size for axis, size in sizes.items() if axis.startswith(stack)}
        heads = common((size for axis, size in own.items() if axis.endswith("heads")), _heads(config, stack))
        ffn = common((size for axis, size in own.items() if axis.endswith("ffn")), getattr(config, f"{stack}_ffn_dim"))
        if heads is None or ffn is None or hidden * _heads(config, stack) != heads * config.d_model:
            return None
        fields |= {f"{stack}_attention_heads": heads, f"{stack}_ffn_dim": ffn}
    return fields


def _embedding_scale(config: Any, hidden: int) -> float:
    return math.sqrt(hidden) if config.scale_embedding else 1.0


def _refresh(model: Any) -> None:
    hidden = model.model.shared.embedding_dim
    for name in _EMBEDDINGS:
        model.get_submodule(name).embed_scale = _embedding_scale(model.config, hidden)
    for _, layer, attentions in _layers(model.config):
        block = model.model.get_submodule(layer)
        block.embed_dim = hidden
        for axis in attentions:
            attention = getattr(block, _ATTENTIONS[axis])
            attention.layer_idx = int(layer.rpartition(".")[2])
            attention.embed_dim = hidden
            attention.num_heads = attention.q_proj.out_features // attention.head_dim


def _logits(model: Any, states: Tensor) -> Tensor:
    logits: Tensor = model.lm_head(states) + model.final_logits_bias
    return logits


BART = ModelFamily(
    name="bart",
    model_types=("bart",),
    task="seq2seq",
    body="model",
    head="lm_head",
    embeddings=_EMBEDDINGS,
    final_states="decoder_hidden_states",
    final_norm=lambda config: f"model.decoder.layers.{config.decoder_layers - 1}.final_layer_norm",
    stacks=(
        # some versions of the stock library keep the encoder's count a second time
        LayerStack("encoder", "model.encoder.layers", "encoder.layer", ("encoder_layers", "num_hidden_layers")),
        LayerStack("decoder", "model.decoder.layers", "decoder.layer", ("decoder_layers",)),
    ),
    score_scale=lambda config, layer: 1.0,
    axes=_axes,
    attentions=_attentions,
    stock_sizes=_stock_sizes,
    refresh=_refresh,
    embedding_scale=_embedding_scale,
    logits=_logits,
)
