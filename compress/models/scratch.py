"""A model from scratch: its configuration, and a tokenizer trained on the data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, PreTrainedTokenizerFast

from compress.errors import DataError, ModelError, located
from compress.models import family_named
from compress.models.family import ModelFamily
from compress.problem import Problem

_INPUTS = ("input_ids", "attention_mask")
"""Model inputs from a tokenizer. The transformers default adds token_type_ids, which GPT-2 would add as embeddings."""


def new_config(settings: Mapping[str, Any], tokenizer: Any = None) -> Any:
    """Return the transformers config that ``settings`` describe, with the vocabulary and special ids of ``tokenizer``.

    Raises :class:`ModelError` for an unknown ``model_type``, a setting the configuration lacks, or a ``vocab_size``
    too small for the tokenizer. Its path starts at ``config``.
    """
    settings = dict(settings)
    model_type = settings.pop("model_type", None)
    if not isinstance(model_type, str):
        raise ModelError(Problem(("config",), "has no model_type, such as the one in any config.json"))
    with located("config"):
        family = family_named(model_type)
    if tokenizer is not None:
        size = settings.setdefault("vocab_size", len(tokenizer))
        if isinstance(size, int) and size < len(tokenizer):
            text = f"{size} is less than the {len(tokenizer)} tokens of the tokenizer; leave it out"
            raise ModelError(Problem(("config", "vocab_size"), text))
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            settings.setdefault(name, getattr(tokenizer, name))
    try:
        stock = AutoConfig.for_model(model_type)
        unknown = [name for name in settings if not hasattr(stock, name)]
        if unknown:
            raise ModelError(Problem(("config", unknown[0]), f"{model_type} has no such setting"))
        _check_sizes(settings, stock)
        config = AutoConfig.for_model(model_type, **settings)
    except (ValueError, TypeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(Problem(("config",), f"cannot build a {model_type} model from it ({reason})")) from None
    if family.task == "seq2seq" and tokenizer is not None:
        for name in ("decoder_start_token_id", "forced_eos_token_id"):
            if name not in settings:
                setattr(config, name, config.eos_token_id)
    return config


def _check_sizes(settings: Mapping[str, Any], stock: Any) -> None:
    """Refuse a size below 1. A size is a field that is an integer or None in the default config and is not an id."""
    for name, value in settings.items():
        usual = getattr(stock, name)
        counts = (type(usual) is int and usual > 0) or (usual is None and isinstance(value, int))
        if counts and "token_id" not in name and isinstance(value, int) and (value < 1 or value is True):
            raise ModelError(Problem(("config", name), f"{value} is not a valid size; allowed: whole numbers from 1"))


def train_bpe(texts: Iterable[str], size: int, family: ModelFamily) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of exactly ``size`` tokens: 256 bytes, the family's special tokens, the merges.

    Text is encoded unchanged (no prefix space, no normalization), and any bytes can be encoded. Raises
    :class:`DataError` if the texts do not yield that many merges.
    """
    special = family.special_tokens
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(dict.fromkeys(special.values())),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != size:
        text = f"{size} is more than the {tokenizer.get_vocab_size()} tokens that the text of data.train yields"
        raise DataError(Problem(("train_bpe",), text))
    if family.task == "seq2seq":
        bos, eos = special["bos_token"], special["eos_token"]
        ends = [(token, tokenizer.token_to_id(token)) for token in (bos, eos)]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A {eos}", pair=f"{bos} $A {eos} {eos} $B {eos}", special_tokens=ends
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=list(_INPUTS), **special)
