"""Llama: decoder-only, RMS pre-normalization, rotary positions, grouped-query attention, gated FFN."""

from compress.models.family import ModelFamily
from compress.models.structure import AttentionTable, FeedForwardTable, LayerStack

LLAMA = ModelFamily(
    name="llama",
    model_types=("llama",),
    task="causal",
    body="model",
    head="lm_head",
    embeddings=("model.embed_tokens",),
    final_states="hidden_states",
    pre_norm=True,
    hidden="hidden_size",
    context="max_position_embeddings",
    activation="hidden_act",
    head_size="head_dim",
    special_tokens={"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
    refused={"pretraining_tp": (1,)},
    stacks=(
        LayerStack(
            name="decoder",
            layers="model.layers",
            axes="layer",
            fields=("num_hidden_layers",),
            heads="num_attention_heads",
            kv_heads="num_key_value_heads",
            ffn="intermediate_size",
            tokens="model.embed_tokens",
            rotary="model.rotary_emb",
            rotary_settings=("rope_parameters", "rope_scaling"),
            final_norm="model.norm",
            attentions=(
                AttentionTable(
                    module="self_attn",
                    query="self_attn.q_proj",
                    key="self_attn.k_proj",
                    value="self_attn.v_proj",
                    out="self_attn.o_proj",
                    norm="input_layernorm",
                ),
            ),
            feed_forward=FeedForwardTable(
                norm="post_attention_layernorm", up="mlp.up_proj", down="mlp.down_proj", gate="mlp.gate_proj"
            ),
        ),
    ),
)
