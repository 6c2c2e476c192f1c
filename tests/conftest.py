"""Tiny random models: every weight, bias, normalization and buffer is random, so that none can be forgotten unseen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BartConfig, GPT2Config, LlamaConfig, MBartConfig

from compress.models.loading import build

pytest_plugins = ["tests.offline", "tests.artifacts"]

Factory = Callable[..., Any]


def _random(config: Any, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build(config)
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        for name, buffer in model.named_buffers():
            if name == "final_logits_bias":
                buffer.copy_(torch.randn(buffer.shape, generator=generator))
    return model


def _gpt2(
    *,
    layers: int = 2,
    heads: int = 4,
    hidden: int = 32,
    ffn: int | None = None,
    vocab: int = 67,
    positions: int = 64,
    tie: bool = True,
    seed: int = 0,
) -> nn.Module:
    config = GPT2Config(
        vocab_size=vocab,
        n_positions=positions,
        n_embd=hidden,
        n_layer=layers,
        n_head=heads,
        n_inner=ffn,
        tie_word_embeddings=tie,
        bos_token_id=0,
        eos_token_id=0,
    )
    return _random(config, seed)


def _bart(
    *,
    config: type[BartConfig] | type[MBartConfig] = BartConfig,
    layers: int = 2,
    decoder_layers: int | None = None,
    heads: int = 4,
    decoder_heads: int | None = None,
    hidden: int = 32,
    ffn: int = 48,
    decoder_ffn: int | None = None,
    vocab: int = 67,
    positions: int = 64,
    tie: bool = True,
    scale_embedding: bool = False,
    seed: int = 0,
) -> nn.Module:
    settings = config(
        vocab_size=vocab,
        max_position_embeddings=positions,
        d_model=hidden,
        encoder_layers=layers,
        decoder_layers=decoder_layers or layers,
        encoder_attention_heads=heads,
        decoder_attention_heads=decoder_heads or heads,
        encoder_ffn_dim=ffn,
        decoder_ffn_dim=decoder_ffn or ffn,
        tie_word_embeddings=tie,
        scale_embedding=scale_embedding,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
    )
    return _random(settings, seed)


def _mbart(**options: Any) -> nn.Module:
    return _bart(config=MBartConfig, **options)


def _llama(
    *,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    hidden: int = 32,
    head_dim: int | None = None,
    ffn: int = 48,
    vocab: int = 67,
    positions: int = 64,
    tie: bool = False,
    bias: bool = False,
    seed: int = 0,
) -> nn.Module:
    config = LlamaConfig(
        vocab_size=vocab,
        max_position_embeddings=positions,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim or hidden // heads,
        intermediate_size=ffn,
        tie_word_embeddings=tie,
        attention_bias=bias,
        mlp_bias=bias,
        bos_token_id=1,
        eos_token_id=2,
    )
    return _random(config, seed)


def _inputs(model: nn.Module, *, batch: int = 2, length: int = 7, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    config: Any = model.config

    def ids(size: int) -> torch.Tensor:
        return torch.randint(3, config.vocab_size, (batch, size), generator=generator)

    mask = torch.ones(batch, length, dtype=torch.long)
    if config.is_encoder_decoder:
        mask[0, -2:] = 0
        return {"input_ids": ids(length), "attention_mask": mask, "decoder_input_ids": ids(length - 2)}
    mask[0, :2] = 0
    return {"input_ids": ids(length), "attention_mask": mask}


@pytest.fixture(scope="session")
def tiny_gpt2() -> Factory:
    """A function that builds a random GPT-2 in float32 and eval mode; see ``_gpt2`` for its options."""
    return _gpt2


@pytest.fixture(scope="session")
def tiny_bart() -> Factory:
    """A function that builds a random BART in float32 and eval mode; see ``_bart`` for its options."""
    return _bart


@pytest.fixture(scope="session")
def tiny_llama() -> Factory:
    """A function that builds a random Llama in float32 and eval mode; see ``_llama`` for its options."""
    return _llama


@pytest.fixture(scope="session")
def tiny_mbart() -> Factory:
    """A function that builds a random mBART in float32 and eval mode; its options are those of ``tiny_bart``."""
    return _mbart


TINY: dict[str, Callable[[], nn.Module]] = {
    "gpt2": _gpt2,
    "bart": _bart,
    "mbart": _mbart,
    "llama": _llama,
    "llama-mha": lambda: _llama(kv_heads=4, tie=True, bias=True, head_dim=6, ffn=40),
}


@pytest.fixture(params=TINY)
def tiny_model(request: pytest.FixtureRequest) -> nn.Module:
    """A random model of each family, Llama with and without shared key/value heads."""
    return TINY[request.param]()


@pytest.fixture(scope="session")
def tiny_inputs() -> Factory:
    """A function that makes random inputs with padding for a model: model, batch, length, seed."""
    return _inputs
