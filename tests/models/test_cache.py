"""Flat caches: a decode that goes through flat tensors equals one that does not."""

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutput

from compress.models.cache import from_cache, to_cache


@pytest.mark.parametrize("empty", [False, True])
def test_gpt2_continues_from_flat_tensors(tiny_gpt2, empty):
    model = tiny_gpt2()
    ids = torch.arange(12).view(2, 6)
    start = 0 if empty else 4
    if empty:
        flat = [torch.zeros(2, 4, 0, 8) for _ in range(4)]
    else:
        flat = from_cache(model(ids[:, :start], use_cache=True).past_key_values)
        assert [tensor.shape for tensor in flat] == [(2, 4, 4, 8)] * 4
    out = model(ids[:, start:], past_key_values=to_cache(flat), use_cache=True)
    torch.testing.assert_close(out.logits, model(ids).logits[:, start:], rtol=1e-5, atol=1e-5)
    assert [tensor.shape for tensor in from_cache(out.past_key_values)] == [(2, 4, 6, 8)] * 4


@pytest.mark.parametrize("empty", [False, True])
def test_bart_continues_from_flat_tensors(tiny_bart, tiny_inputs, empty):
    model = tiny_bart(decoder_heads=2)
    inputs = tiny_inputs(model)
    encoded = BaseModelOutput(model.model.encoder(inputs["input_ids"], inputs["attention_mask"])[0])
    ids, start = inputs["decoder_input_ids"], 0 if empty else 3

    def decode(ids, cache=None):
        mask = inputs["attention_mask"]
        return model(
            encoder_outputs=encoded, attention_mask=mask, decoder_input_ids=ids, past_key_values=cache, use_cache=True
        )

    if empty:
        flat = [torch.zeros(2, 2, 0, 16) for _ in range(8)]
    else:
        flat = from_cache(decode(ids[:, :start]).past_key_values)
        assert [tensor.shape[2] for tensor in flat] == [3, 3, 7, 7] * 2
    out = decode(ids[:, start:], to_cache(flat, cross=True))
    torch.testing.assert_close(out.logits, decode(ids).logits[:, start:], rtol=1e-5, atol=1e-5)
    assert [tensor.shape[2] for tensor in from_cache(out.past_key_values)] == [5, 5, 7, 7] * 2
