from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from compress.errors import DataError, ModelError
from compress.models import families, family_named
from compress.models.families import BUILT_IN
from compress.models.families.bart import BART
from compress.models.families.gpt2 import GPT2
from compress.models.loading import build, load_stock, load_tokenizer
from compress.models.scratch import new_config, train_bpe
from compress.onnx.export.exporter import export

TEXTS = ["the cat sat on the mat", "der Hund lief in den Park", "42 dogs; no cats!"] * 4
CAUSAL = train_bpe(TEXTS, 280, GPT2)


@given(st.text(st.characters(exclude_categories=["Cs"])))
@settings(deadline=None)
def test_any_text_survives_encoding(text: str) -> None:
    assert CAUSAL.decode(CAUSAL(text)["input_ids"], clean_up_tokenization_spaces=False) == text


def test_training_is_deterministic() -> None:
    assert train_bpe(TEXTS, 280, GPT2).get_vocab() == CAUSAL.get_vocab()


def test_sequence_to_sequence_text_is_wrapped() -> None:
    tokenizer = train_bpe(TEXTS, 280, BART)
    ids = tokenizer("the cat")["input_ids"]
    assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the cat"
    assert len({tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}) == 4


def test_a_saved_tokenizer_is_the_same(tmp_path: Path) -> None:
    CAUSAL.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again("a new cat")["input_ids"] == CAUSAL("a new cat")["input_ids"]
    assert again.eos_token_id == CAUSAL.eos_token_id


def quickstart_teacher() -> tuple[Any, Any]:
    teacher = Path(__file__).parents[2] / "recipes" / "quickstart" / "teacher"
    return load_tokenizer(teacher), load_stock(teacher)


def saved_and_opened(tmp_path: Path) -> tuple[Any, Any]:
    CAUSAL.save_pretrained(tmp_path)
    config = new_config({"model_type": "gpt2", "n_layer": 1, "n_embd": 8, "n_head": 2}, CAUSAL)
    return AutoTokenizer.from_pretrained(tmp_path), build(config)


@pytest.mark.parametrize("made", ["trained here", "the quickstart's"])
def test_what_a_tokenizer_returns_can_be_given_to_the_model(made: str, tmp_path: Path) -> None:
    tokenizer, model = saved_and_opened(tmp_path) if made == "trained here" else quickstart_teacher()
    encoded = tokenizer("the cat", return_tensors="pt")
    expected = model(input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"]).logits
    assert torch.equal(model(**encoded).logits, expected)
    assert set(encoded) == {"input_ids", "attention_mask"}


@pytest.mark.optimum
def test_what_a_tokenizer_returns_can_be_given_to_an_exported_model(tmp_path: Path) -> None:
    optimum = pytest.importorskip("optimum.onnxruntime", exc_type=ImportError)
    tokenizer, model = saved_and_opened(tmp_path / "tokenizer")
    model.config.save_pretrained(tmp_path / "tokenizer")
    export(model, tmp_path / "tokenizer")
    encoded = tokenizer("the cat", return_tensors="pt")
    found = optimum.ORTModelForCausalLM.from_pretrained(tmp_path / "tokenizer").generate(**encoded, max_new_tokens=2)
    assert found.shape[1] > encoded["input_ids"].shape[1]


SEQ2SEQ = {
    "d_model": 8,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
}
SIZES = {
    "gpt2": {"n_layer": 1, "n_embd": 8, "n_head": 2},
    "bart": SEQ2SEQ,
    "mbart": SEQ2SEQ,
    "llama": {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1},
}


def test_every_family_has_sizes_here() -> None:
    assert {family.name for family in families()} >= set(SIZES) == {family.name for family in BUILT_IN}


@pytest.mark.parametrize("name", SIZES)
def test_a_model_from_nothing_reads_its_tokenizers_text(name: str) -> None:
    """The family's special tokens are the tokenizer's, and the model knows them by the same ids."""
    family = family_named(name)
    tokenizer = train_bpe(TEXTS, 280, family)
    assert {key: getattr(tokenizer, key) for key in family.special_tokens} == family.special_tokens
    config = new_config({"model_type": name, **SIZES[name]}, tokenizer)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(config, key) == getattr(tokenizer, key)
    model = build(config)
    encoded = tokenizer("the cat", return_tensors="pt")
    assert model(**encoded).logits.shape == (1, encoded["input_ids"].shape[1], 280)
    text = tokenizer.decode(encoded["input_ids"][0], skip_special_tokens=True)
    assert text == "the cat"


def test_too_little_text_is_reported() -> None:
    with pytest.raises(
        DataError, match=r"train_bpe: 5000 is more than the \d+ tokens that the text of data.train yields"
    ):
        train_bpe(TEXTS, 5000, GPT2)


def test_a_config_takes_vocabulary_and_ids_from_the_tokenizer() -> None:
    config = new_config({"model_type": "gpt2", "n_layer": 1, "n_embd": 8, "n_head": 2}, CAUSAL)
    assert config.vocab_size == len(CAUSAL) == 280
    assert config.eos_token_id == CAUSAL.eos_token_id
    assert build(config).transformer.wte.weight.shape == (280, 8)


def test_a_decoder_starts_with_the_end_token() -> None:
    tokenizer = train_bpe(TEXTS, 280, BART)
    config = new_config({"model_type": "bart", "d_model": 8, "encoder_layers": 1, "decoder_layers": 1}, tokenizer)
    assert config.decoder_start_token_id == config.eos_token_id == tokenizer.eos_token_id
    assert config.pad_token_id == tokenizer.pad_token_id
    assert config.forced_eos_token_id == tokenizer.eos_token_id


def test_answers_end_with_the_tokenizers_own_end() -> None:
    tokenizer = train_bpe(TEXTS, 280, BART)
    tokenizer.eos_token = "<unk>"
    sizes = {"model_type": "bart", "d_model": 8, "encoder_layers": 1, "decoder_layers": 1}
    config = new_config(sizes, tokenizer)
    assert config.forced_eos_token_id == config.decoder_start_token_id == config.eos_token_id == 3
    assert new_config({**sizes, "forced_eos_token_id": None}, tokenizer).forced_eos_token_id is None
    assert new_config({**sizes, "eos_token_id": 0}, tokenizer).forced_eos_token_id == 0


def test_what_may_be_0_in_a_config_is_left_alone() -> None:
    zeros = {"attn_pdrop": 0, "bos_token_id": 0, "use_cache": False, "n_layer": 1, "n_embd": 8, "n_head": 2}
    config = new_config({"model_type": "gpt2", **zeros}, CAUSAL)
    assert (config.attn_pdrop, config.bos_token_id, config.use_cache) == (0, 0, False)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"n_layer": 1}, "config: has no model_type"),
        ({"model_type": "nothing"}, "model_type 'nothing' is not supported; supported: gpt2, bart, mbart, llama"),
        ({"model_type": "opt"}, "model_type 'opt' is not supported"),
        ({"model_type": "gpt2", "layers": 1}, "config.layers: gpt2 has no such setting"),
        ({"model_type": "gpt2", "n_layer": 0}, "config.n_layer: 0 is not a valid size; allowed: whole numbers from 1"),
        ({"model_type": "gpt2", "n_embd": -4}, "config.n_embd: -4 is not a valid size; allowed: whole numbers from 1"),
        (
            {"model_type": "gpt2", "n_inner": -3},
            "config.n_inner: -3 is not a valid size; allowed: whole numbers from 1",
        ),
        (
            {"model_type": "gpt2", "n_layer": True},
            "config.n_layer: True is not a valid size; allowed: whole numbers from 1",
        ),
        ({"model_type": "gpt2", "num_hidden_layers": -1}, "config.num_hidden_layers: -1 is not a valid size; allowed"),
        ({"model_type": "bart", "decoder_layers": 0}, "config.decoder_layers: 0 is not a valid size; allowed"),
        (
            {"model_type": "gpt2", "vocab_size": 10},
            "config.vocab_size: 10 is less than the 280 tokens of the tokenizer",
        ),
    ],
)
def test_a_wrong_config_is_reported(settings: dict[str, object], text: str) -> None:
    with pytest.raises(ModelError, match=text):
        new_config(settings, CAUSAL)
