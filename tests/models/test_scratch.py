from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from compress.errors import DataError, ModelError
from compress.models.loading import build
from compress.models.scratch import new_config, train_bpe

TEXTS = ["the cat sat on the mat", "der Hund lief in den Park", "42 dogs; no cats!"] * 4
CAUSAL = train_bpe(TEXTS, 280, "causal")


@given(st.text(st.characters(exclude_categories=["Cs"])))
@settings(deadline=None)
def test_any_text_survives_encoding(text: str) -> None:
    assert CAUSAL.decode(CAUSAL(text)["input_ids"], clean_up_tokenization_spaces=False) == text


def test_training_is_deterministic() -> None:
    assert train_bpe(TEXTS, 280, "causal").get_vocab() == CAUSAL.get_vocab()


def test_sequence_to_sequence_text_is_wrapped() -> None:
    tokenizer = train_bpe(TEXTS, 280, "seq2seq")
    ids = tokenizer("the cat")["input_ids"]
    assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the cat"
    assert len({tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}) == 4


def test_a_saved_tokenizer_is_the_same(tmp_path: Path) -> None:
    CAUSAL.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again("a new cat")["input_ids"] == CAUSAL("a new cat")["input_ids"]
    assert again.eos_token_id == CAUSAL.eos_token_id


def test_too_little_text_is_told() -> None:
    with pytest.raises(DataError, match=r"train_bpe is 5000, but data.train only holds text for \d+ tokens"):
        train_bpe(TEXTS, 5000, "causal")


def test_a_config_takes_vocabulary_and_ids_from_the_tokenizer() -> None:
    config = new_config({"model_type": "gpt2", "n_layer": 1, "n_embd": 8, "n_head": 2}, CAUSAL)
    assert config.vocab_size == len(CAUSAL) == 280
    assert config.eos_token_id == CAUSAL.eos_token_id
    assert build(config).transformer.wte.weight.shape == (280, 8)


def test_a_decoder_starts_with_the_end_token() -> None:
    tokenizer = train_bpe(TEXTS, 280, "seq2seq")
    config = new_config({"model_type": "bart", "d_model": 8, "encoder_layers": 1, "decoder_layers": 1}, tokenizer)
    assert config.decoder_start_token_id == config.eos_token_id == tokenizer.eos_token_id
    assert config.pad_token_id == tokenizer.pad_token_id
    assert config.forced_eos_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"n_layer": 1}, "config has no model_type"),
        ({"model_type": "nothing"}, "model_type 'nothing' is not supported; supported: gpt2, bart"),
        ({"model_type": "llama"}, "model_type 'llama' is not supported"),
        ({"model_type": "gpt2", "layers": 1}, "config.layers is no setting of gpt2"),
        ({"model_type": "gpt2", "vocab_size": 10}, "config.vocab_size is 10, but the tokenizer has 280 tokens"),
    ],
)
def test_a_wrong_config_is_told(settings: dict[str, object], text: str) -> None:
    with pytest.raises(ModelError, match=text):
        new_config(settings, CAUSAL)
