"""GPT-2: decoder-only, pre-normalization, fused query, key and value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from compress.errors import ModelError
from compress.models.structure import Attention, Axis, LayerStack, ModelFamily, Projection, Slot, common


def _axes(config: Any) -> tuple[Axis, ...]:
    if config.add_cross_attention:
        raise ModelError("add_cross_attention is true; only a GPT-2 without cross-attention is supported")
    width = config.n_embd // config.n_head
    hidden = [Slot("transformer.wte", "out"), Slot("transformer.wpe", "out")]
    inner: list[Axis] = []
    for n in range(config.n_layer):
        block = f"transformer.h.{n}"
        hidden += [
            *(Slot(f"{block}.{name}", "out") for name in ("ln_1", "attn.c_proj", "ln_2", "mlp.c_proj")),
            *(Slot(f"{block}.{name}", "in") for name in ("attn.c_attn", "mlp.c_fc")),
        ]
        heads = (Slot(f"{block}.attn.c_attn", "out", width, 3), Slot(f"{block}.attn.c_proj", "in", width))
        ffn = (Slot(f"{block}.mlp.c_fc", "out"), Slot(f"{block}.mlp.c_proj", "in"))
        inner += [
            Axis(f"layer.{n}.heads", "heads", config.n_head, heads),
            Axis(f"layer.{n}.ffn", "ffn", config.n_inner or 4 * config.n_embd, ffn),
        ]
    hidden += [Slot("transformer.ln_f", "out"), Slot("lm_head", "in")]
    return (Axis("hidden", "hidden", config.n_embd, tuple(hidden)), *inner)


def _attentions(config: Any) -> tuple[Attention, ...]:
    def attention(n: int) -> Attention:
        query, key, value = (Projection(f"transformer.h.{n}.attn.c_attn", part, 3) for part in range(3))
        return Attention(f"layer.{n}.heads", query, key, value, causal=True)

    return tuple(attention(n) for n in range(config.n_layer))


def _stock_sizes(config: Any, sizes: Mapping[str, int]) -> dict[str, Any] | None:
    hidden = sizes["hidden"]
    heads = common((size for axis, size in sizes.items() if axis.endswith(".heads")), config.n_head)
    ffn = common((size for axis, size in sizes.items() if axis.endswith(".ffn")), config.n_inner or 4 * hidden)
    if heads is None or ffn is None or hidden * config.n_head != heads * config.n_embd:
        return None
    implied = config.n_inner is None and ffn == 4 * hidden
    return {"n_embd": hidden, "n_head": heads, "n_inner": None if implied else ffn}


def _score_scale(config: Any, layer: int) -> float:
    return 1 / (layer + 1) if config.scale_attn_by_inverse_layer_idx else 1.0


def _refresh(model: Any) -> None:
    model.transformer.embed_dim = model.transformer.wte.embedding_dim
    for n, block in enumerate(model.transformer.h):
        attention = block.attn
        attention.layer_idx = n
        if hasattr(attention, "scaling"):  # version 5 of the stock library computes it once
            usual = attention.head_dim**-0.5 if attention.scale_attn_weights else 1.0
            attention.scaling = usual * _score_scale(model.config, n)
        attention.embed_dim = model.transformer.embed_dim
        attention.split_size = attention.c_proj.nx
        attention.num_heads = attention.split_size // attention.head_dim


def _logits(model: Any, states: Tensor) -> Tensor:
    logits: Tensor = model.lm_head(states)
    return logits


GPT2 = ModelFamily(
    name="gpt2",
    model_types=("gpt2",),
    task="causal",
    body="transformer",
    head="lm_head",
    embeddings=("transformer.wte",),
    final_states="hidden_states",
    final_norm=lambda config: "transformer.ln_f",
    stacks=(LayerStack("decoder", "transformer.h", "layer", ("n_layer",)),),
    score_scale=_score_scale,
    axes=_axes,
    attentions=_attentions,
    stock_sizes=_stock_sizes,
    refresh=_refresh,
    embedding_scale=lambda config, hidden: 1.0,
    logits=_logits,
)
