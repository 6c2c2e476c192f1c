"""Laws of dropout for a while: 0 makes training deterministic, p is p everywhere, and what was comes back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from compress.models.dropout import set_dropout
from compress.models.loading import build

DROPPED = {
    "gpt2": {"embd_pdrop": 0.2, "resid_pdrop": 0.3, "attn_pdrop": 0.4},
    "bart": {
        "dropout": 0.2,
        "attention_dropout": 0.3,
        "activation_dropout": 0.4,
        "encoder_layerdrop": 0.5,
        "decoder_layerdrop": 0.6,
    },
    "llama": {"attention_dropout": 0.4},
}
DROPPED["mbart"] = DROPPED["bart"]


@pytest.fixture(params=list(DROPPED))
def model(request: pytest.FixtureRequest) -> Any:
    config = copy.deepcopy(request.getfixturevalue(f"tiny_{request.param}")(layers=4).config)
    for name, value in DROPPED[request.param].items():
        setattr(config, name, value)
    return build(config).train()


def numbers(model: nn.Module) -> dict[str, float]:
    """Every number in the model that says how often something is dropped."""
    return {
        f"{path}.{name}": value
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, int | float) and (name == "p" or "drop" in name)
    }


def differs(model: Any, inputs: Any) -> bool:
    return any(not torch.equal(model(**inputs).logits, model(**inputs).logits) for _ in range(4))


def test_none_leaves_the_models_own(model: Any, tiny_inputs: Any) -> None:
    before = numbers(model)
    with set_dropout(model, None):
        assert numbers(model) == before
        assert differs(model, tiny_inputs(model))


def test_zero_drops_nothing_not_even_layers(model: Any, tiny_inputs: Any) -> None:
    inputs = tiny_inputs(model)
    with set_dropout(model, 0.0):
        assert set(numbers(model).values()) == {0.0}
        trained = model(**inputs).logits
        assert not differs(model, inputs)
    torch.testing.assert_close(trained, model.eval()(**inputs).logits)


def test_a_probability_is_used_everywhere_but_for_whole_layers(model: Any) -> None:
    with set_dropout(model, 0.25):
        for name, value in numbers(model).items():
            assert value == {"model.encoder.layerdrop": 0.5, "model.decoder.layerdrop": 0.6}.get(name, 0.25), name


def test_what_was_comes_back_after_an_error_too(model: Any) -> None:
    before = numbers(model)
    with pytest.raises(KeyError), set_dropout(model, 0.0):
        assert numbers(model) != before
        raise KeyError
    assert numbers(model) == before
    assert len(before) >= 4  # one attention per layer of Llama, which has no other dropout
    assert len(before) > 8 or model.config.model_type == "llama"


def test_a_probability_written_as_an_integer_is_one(tiny_bart: Any) -> None:
    config = copy.deepcopy(tiny_bart().config)
    config.activation_dropout = 0
    model = build(config)
    with set_dropout(model, 0.5):
        assert model.model.encoder.layers[0].activation_dropout == 0.5
