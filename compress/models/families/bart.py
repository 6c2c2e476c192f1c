"""BART: encoder-decoder, post-normalization, token embeddings shared by encoder, decoder and head."""

from compress.models.family import ModelFamily
from compress.models.structure import AttentionTable, FeedForwardTable, LayerStack


def _attention(module: str, **settings: object) -> AttentionTable:
    query, key, value, out = (f"{module}.{part}_proj" for part in ("q", "k", "v", "out"))
    return AttentionTable(module, query, key, value, out, norm=f"{module}_layer_norm", **settings)  # type: ignore[arg-type]


_FEED_FORWARD = FeedForwardTable(norm="final_layer_norm", up="fc1", down="fc2")

ENCODER = LayerStack(
    name="encoder",
    layers="model.encoder.layers",
    axes="encoder.layer",
    fields=("encoder_layers", "num_hidden_layers"),  # some versions of transformers keep a second count
    heads="encoder_attention_heads",
    ffn="encoder_ffn_dim",
    tokens="model.encoder.embed_tokens",
    positions="model.encoder.embed_positions",
    position_offset=2,
    embedding_norm="model.encoder.layernorm_embedding",
    attentions=(_attention("self_attn", causal=False),),
    feed_forward=_FEED_FORWARD,
)
DECODER = LayerStack(
    name="decoder",
    layers="model.decoder.layers",
    axes="decoder.layer",
    fields=("decoder_layers",),
    heads="decoder_attention_heads",
    ffn="decoder_ffn_dim",
    tokens="model.decoder.embed_tokens",
    positions="model.decoder.embed_positions",
    position_offset=2,
    embedding_norm="model.decoder.layernorm_embedding",
    attentions=(
        _attention("self_attn"),
        _attention("encoder_attn", axis="cross_heads", causal=False, cross=True),
    ),
    feed_forward=_FEED_FORWARD,
)
BART = ModelFamily(
    name="bart",
    model_types=("bart",),
    task="seq2seq",
    body="model",
    head="lm_head",
    embeddings=("model.shared", "model.encoder.embed_tokens", "model.decoder.embed_tokens"),
    final_states="decoder_hidden_states",
    pre_norm=False,
    hidden="d_model",
    context="max_position_embeddings",
    activation="activation_function",
    scales_embedding="scale_embedding",
    logits_bias="final_logits_bias",
    special_tokens={"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"},
    stacks=(ENCODER, DECODER),
)
