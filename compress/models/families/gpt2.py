"""GPT-2: decoder-only, pre-normalization, learned positions, fused query, key and value."""

from compress.models.family import ModelFamily
from compress.models.structure import AttentionTable, FeedForwardTable, LayerStack

GPT2 = ModelFamily(
    name="gpt2",
    model_types=("gpt2",),
    task="causal",
    body="transformer",
    head="lm_head",
    embeddings=("transformer.wte",),
    final_states="hidden_states",
    pre_norm=True,
    hidden="n_embd",
    context="n_positions",
    activation="activation_function",
    scales_scores="scale_attn_weights",
    scales_by_layer="scale_attn_by_inverse_layer_idx",
    special_tokens={"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"},
    refused={"add_cross_attention": (False,)},
    stacks=(
        LayerStack(
            name="decoder",
            layers="transformer.h",
            axes="layer",
            fields=("n_layer",),
            heads="n_head",
            ffn="n_inner",
            tokens="transformer.wte",
            positions="transformer.wpe",
            final_norm="transformer.ln_f",
            attentions=(
                AttentionTable(
                    module="attn",
                    query="attn.c_attn",
                    key="attn.c_attn",
                    value="attn.c_attn",
                    out="attn.c_proj",
                    norm="ln_1",
                ),
            ),
            feed_forward=FeedForwardTable(norm="ln_2", up="mlp.c_fc", down="mlp.c_proj"),
        ),
    ),
)
