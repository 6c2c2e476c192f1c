"""Loading: stock directories come back as they were written, broken ones are refused in one line."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.errors import ModelError
from compress.models import family_of
from compress.models.loading import build, load_config, load_stock, load_tokenizer


def test_a_stock_directory_loads_in_float32_and_eval(tiny_model, tmp_path):
    model = tiny_model
    model.save_pretrained(tmp_path)
    loaded = load_stock(tmp_path)
    assert not loaded.training
    assert type(loaded) is type(model)
    assert all(torch.equal(tensor, loaded.state_dict()[key]) for key, tensor in model.state_dict().items())
    model.half().save_pretrained(tmp_path / "half")
    assert {parameter.dtype for parameter in load_stock(str(tmp_path / "half")).parameters()} == {torch.float32}
    config = load_config(tmp_path / "half")
    assert {parameter.dtype for parameter in build(config).parameters()} == {torch.float32}
    assert not build(config).training


@pytest.mark.parametrize("settings", [{"scale_attn_weights": False}, {"scale_attn_by_inverse_layer_idx": True}])
def test_scores_are_scaled_as_the_config_says(tiny_gpt2, tiny_inputs, tmp_path, settings):
    usual = tiny_gpt2()
    usual.save_pretrained(tmp_path)
    config = load_config(tmp_path)
    config.update(settings)
    config.save_pretrained(tmp_path)
    oracle = type(usual)._from_config(config, attn_implementation="eager").eval()
    built = build(config)
    inputs = tiny_inputs(usual)
    oracle.load_state_dict(usual.state_dict())
    built.load_state_dict(usual.state_dict())
    with torch.no_grad():
        expected, other = oracle(**inputs).logits, usual(**inputs).logits
        assert (expected - other)[1].abs().max() > 1e-3
        for model in (built, load_stock(tmp_path)):
            torch.testing.assert_close(model(**inputs).logits[1], expected[1])


@pytest.mark.parametrize("family", ["tiny_bart", "tiny_mbart"])
def test_an_untied_encoder_and_decoder_open_as_they_were_saved(family, request, tiny_inputs, tmp_path):
    """Version 4 of the stock library saves a table that its classes share once, and opens the others as noise."""
    model = request.getfixturevalue(family)(tie=False)
    sites = [model.get_submodule(name) for name in family_of(model.config).embeddings]
    assert len({id(site.weight) for site in sites}) == 3
    inputs = tiny_inputs(model)
    model.save_pretrained(tmp_path / "apart")
    torch.testing.assert_close(load_stock(tmp_path / "apart")(**inputs).logits, model(**inputs).logits)
    for site in sites[1:]:
        site.weight = sites[0].weight
    state = {name: tensor for name, tensor in model.state_dict().items() if "embed_tokens" not in name}
    (tmp_path / "once").mkdir()
    model.config.save_pretrained(tmp_path / "once")
    save_file(state, tmp_path / "once" / "model.safetensors", metadata={"format": "pt"})
    once = load_stock(tmp_path / "once")
    torch.testing.assert_close(once(**inputs).logits, model(**inputs).logits)
    assert once.model.encoder.embed_tokens.weight is not once.model.decoder.embed_tokens.weight
    del state["model.shared.weight"]
    save_file(state, tmp_path / "once" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.safetensors lacks model\.decoder\.embed_tokens"):
        load_stock(tmp_path / "once")


def test_a_missing_directory_is_named(tmp_path):
    with pytest.raises(ModelError, match="nowhere"):
        load_stock(tmp_path / "nowhere")


def test_missing_tensors_and_pickles_are_refused(tiny_gpt2, tmp_path):
    model = tiny_gpt2()
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["transformer.h.1.mlp.c_fc.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks transformer\.h\.1\.mlp\.c_fc\.weight"):
        load_stock(tmp_path)
    tensors["transformer.h.1.mlp.c_fc.weight"] = torch.zeros(3, 3)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        load_stock(tmp_path)
    file.unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        load_stock(tmp_path)


def test_a_config_of_another_family_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ModelError, match="'bert' is not supported"):
        load_stock(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json"):
        load_config(tmp_path)


@pytest.mark.parametrize("content", ["[]", "null", "3", '{"model_type": "gpt2", "n_head": []}', '{"model_type": []}'])
def test_a_config_that_is_none_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match=r"config") as caught:
        build(load_config(tmp_path))
    assert "\n" not in str(caught.value)


def test_generation_settings_that_are_none_are_refused(tiny_gpt2, tmp_path):
    tiny_gpt2().save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text("[]")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_stock(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "version https://git-lfs", "{}", "[]", "3"])
def test_a_tokenizer_that_is_none_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match="cannot read the tokenizer") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
