"""Laws of float16 in packed models: rounded once, restored as it was rounded, refused where it would not hold."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from compress.errors import ModelError
from compress.models import family_of
from compress.models.loading import build
from compress.models.structure import stock_tensors
from compress.surgery.quantization import (
    Quantization,
    Storage,
    left_in_float32,
    packed_bytes,
    packed_state,
    plan,
    quantize,
    restore,
)
from compress.surgery.quantization.spec import QuantizationSpec

HALF = Storage(scales="float16", positions="float16")
POSITIONS = ("wpe.weight", "embed_positions.weight")
LEARNED_POSITIONS = ["gpt2", "bart", "mbart"]


def settings_of(granularity: str = "tensor", store: Storage = HALF) -> Quantization:
    weights, embedding = {"bits": 2, "granularity": granularity}, {"bits": 4}
    return Quantization.model_validate({"weights": weights, "embedding": embedding, "store": store.model_dump()})


def quantized(model: Any, config: Quantization) -> Any:
    model = copy.deepcopy(model)
    quantize(model, family_of(model.config), config)
    return model


def restored(model: Any, state: dict[str, torch.Tensor], spec: QuantizationSpec) -> Any:
    fresh = build(model.config)
    restore(fresh, family_of(model.config), spec, state, dequantize=False)
    return fresh


def logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**inputs).logits
    return found


@pytest.fixture(params=["gpt2", "bart", "mbart", "llama"])
def tiny(request: pytest.FixtureRequest) -> Callable[..., Any]:
    factory: Callable[..., Any] = request.getfixturevalue(f"tiny_{request.param}")
    return factory


@pytest.mark.slow
@pytest.mark.parametrize("granularity", ["tensor", "row", "group"])
@pytest.mark.parametrize("store", [HALF, Storage(scales="float16"), Storage(positions="float16")])
def test_what_is_stored_in_half_is_the_nearest(tiny: Any, granularity: str, store: Storage) -> None:
    model = quantized(tiny(hidden=40), settings_of(granularity, store))
    exact, _ = packed_state(model)
    state, spec = packed_state(model, store)
    stock = tiny(hidden=40)
    planned = plan(stock, family_of(stock.config), settings_of(granularity, store))
    assert {each.module: each for each in planned.matrices} == {each.module: each for each in spec.matrices}
    assert planned.half == spec.half and not left_in_float32(planned, spec)
    lone = {f"{matrix.module}.scale" for matrix in spec.stored if matrix.granularity == "tensor"}
    for name, tensor in state.items():
        scale = store.scales == "float16" and name.endswith(".scale") and name not in lone
        half = scale or (store.positions == "float16" and name.endswith(POSITIONS))
        assert tensor.dtype == (torch.float16 if half else exact[name].dtype), name
        assert torch.equal(tensor, exact[name].half() if half else exact[name]), name
    elements = sum(tensor.numel() for tensor in stock_tensors(stock))
    assert (
        packed_bytes(spec, elements) == packed_bytes(planned, elements) == sum(each.nbytes for each in state.values())
    )


@pytest.mark.slow
@pytest.mark.parametrize("granularity", ["row", "group"])
def test_a_restored_model_computes_with_the_rounded_numbers(tiny: Any, tiny_inputs: Any, granularity: str) -> None:
    model = quantized(tiny(hidden=40), settings_of(granularity))
    state, spec = packed_state(model, HALF)
    widened = {name: each.float() if each.dtype == torch.float16 else each for name, each in state.items()}
    _, wide = packed_state(model)
    inputs = tiny_inputs(model)
    ours = logits(restored(model, state, spec), inputs)
    assert torch.equal(ours, logits(restored(model, widened, wide), inputs))
    assert not torch.equal(ours, logits(restored(model, *packed_state(model)), inputs))


@pytest.mark.slow
def test_the_type_of_every_tensor_is_checked(tiny: Any) -> None:
    model = quantized(tiny(), settings_of("row"))
    state, spec = packed_state(model, HALF)
    assert sum(tensor.dtype == torch.float16 for tensor in state.values()) > 2
    for name, tensor in state.items():
        if tensor.dtype == torch.float16:
            with pytest.raises(ModelError, match=rf"{name}: expected torch\.float16"):
                restored(model, {**state, name: tensor.float()}, spec)


@pytest.mark.parametrize(
    ("size", "held"), [(1e-9, False), (6.0e-5, False), (6.2e-5, True), (65504, True), (7e4, False)]
)
def test_scales_beyond_float16_stay_float32(tiny_gpt2: Any, tiny_inputs: Any, size: float, held: bool) -> None:
    config = Quantization.model_validate(
        {"weights": {"bits": 2, "method": "round_to_nearest"}, "embedding": {"bits": 2}, "store": HALF.model_dump()}
    )
    stock = tiny_gpt2()
    with torch.no_grad():
        stock.transformer.wte.weight[5] = size
        stock.transformer.wte.weight[6] = 0  # a scale of 0 is exact
    model = quantized(stock, config)
    state, spec = packed_state(model, HALF)
    scale = state["transformer.wte.scale"]
    assert scale.dtype == (torch.float16 if held else torch.float32)
    assert scale[5] == pytest.approx(size, rel=2**-11) and scale[6] == 0
    assert {matrix.scales for matrix in spec.matrices if "wte" in matrix.module + matrix.shares} == {
        "float16" if held else "float32"
    }
    intended = plan(tiny_gpt2(), family_of(stock.config), config)
    assert left_in_float32(intended, spec) == ([] if held else ["transformer.wte.scale"])
    inputs = tiny_inputs(model)
    if not held:
        exact = packed_state(model, Storage(positions="float16"))
        assert torch.equal(logits(restored(model, state, spec), inputs), logits(restored(model, *exact), inputs))
    elements = sum(tensor.numel() for tensor in stock_tensors(stock))
    assert packed_bytes(spec, elements) == sum(each.nbytes for each in state.values())


@pytest.mark.parametrize("value", [7e4, -7e4, float("nan")])
@pytest.mark.parametrize("tiny", LEARNED_POSITIONS, indirect=True)
def test_positions_beyond_float16_stay_float32(tiny: Any, value: float) -> None:
    model = quantized(tiny(), settings_of())
    name = next(name for name, _ in model.named_parameters() if name.endswith(POSITIONS))
    with torch.no_grad():
        model.get_parameter(name)[1, 2] = value
    state, spec = packed_state(model, HALF)
    assert state[name].dtype == torch.float32 and name not in spec.half
    intended = plan(tiny(), family_of(model.config), settings_of())
    assert left_in_float32(intended, spec) == [name]


@pytest.mark.slow
@pytest.mark.parametrize("tiny", LEARNED_POSITIONS, indirect=True)
def test_records_say_nothing_of_what_stays_as_it_was(tiny: Any) -> None:
    """What was made before the option came keeps its key and its digest."""
    _, spec = packed_state(quantized(tiny(), settings_of("row", Storage())))
    record = spec.model_dump(mode="json")
    assert set(record) == {"matrices"}
    assert all("scales" not in matrix for matrix in record["matrices"])
    _, spec = packed_state(quantized(tiny(), settings_of("row")), HALF)
    assert QuantizationSpec.model_validate_json(spec.model_dump_json()) == spec
    assert set(spec.model_dump(mode="json")) == {"matrices", "half"}


@pytest.mark.parametrize("store", [{"scales": "bfloat16"}, {"biases": "float16"}, "float16"])
def test_other_types_are_refused(store: Any) -> None:
    with pytest.raises(ValidationError):
        Quantization.model_validate({"weights": {"bits": 2}, "embedding": {"bits": 2}, "store": store})
