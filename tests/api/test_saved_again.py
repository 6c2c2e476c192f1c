"""A directory of packed codes can be loaded, trained, saved and exported again, and keeps its codes bit for bit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import compress
from compress.artifact import adopt
from compress.errors import ModelError, UserError
from compress.surgery.quantization import Product

STORE = {"scales": "float16", "positions": "float16"}


@pytest.fixture(params=["float32", "float16"])
def packed(request: Any, tiny_model: Any, stock: Any, run_stage: Any) -> Any:
    """A directory that a recipe wrote, with scales and positions in either type."""
    store = {} if request.param == "float32" else {"store": STORE}
    settings = {"type": "quantize", "weights": {"bits": 4, "group_size": 32}, "embedding": {"bits": 8}}
    return run_stage(settings | store | {"train": {"steps": 0}}, stock(tiny_model))


def rows_for(model: Any) -> list[dict[str, list[int]]]:
    rows = [{"input_ids": [3 + (5 * i + j) % 60 for j in range(10)]} for i in range(8)]
    return [row | {"labels": row["input_ids"]} for row in rows] if model.config.is_encoder_decoder else rows


def test_what_was_loaded_is_saved_as_it_was(tmp_path: Path, packed: Any) -> None:
    again = compress.save(copy.deepcopy(compress.load(packed.path)), tmp_path / "again")
    assert adopt(again).digest == packed.digest
    assert adopt(again).manifest.quantization == packed.manifest.quantization


@pytest.mark.slow
def test_a_directory_is_exported_as_the_stage_exports_it(tmp_path: Path, packed: Any, run_stage: Any) -> None:
    stage = run_stage({"type": "export_onnx"}, packed, out="onnx")
    compress.export_onnx(packed.path, tmp_path / "directory")
    compress.export_onnx(compress.load(packed.path), tmp_path / "model")
    assert adopt(tmp_path / "directory").digest == adopt(tmp_path / "model").digest == stage.digest


@pytest.mark.slow
def test_a_float_directory_brings_its_tokenizer(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    saved = compress.save(model, tmp_path / "saved", tokenizer=tokenizer)
    compress.export_onnx(saved, tmp_path / "directory")
    compress.export_onnx(model, tmp_path / "model", tokenizer=tokenizer)
    one, other = (adopt(tmp_path / name).manifest.files for name in ("directory", "model"))
    assert all(one[name] == other[name] for name in ("model.onnx", "tokenizer.json"))


@pytest.mark.slow
def test_what_has_no_codes_trains_and_is_saved(tmp_path: Path, tiny_model: Any, tiny_inputs: Any) -> None:
    compress.quantize_(tiny_model, weights=4, group_size=32)
    model = compress.load(compress.save(tiny_model, tmp_path / "first"))
    compress.finetune(model, rows_for(model), steps=2, lr=1e-2, batch=4, progress=False)
    again = compress.load(compress.save(model, tmp_path / "second"))
    with torch.no_grad():
        assert torch.equal(model(**tiny_inputs(model)).logits, again(**tiny_inputs(model)).logits)
    first, second = (load_file(tmp_path / name / "quantized.safetensors") for name in ("first", "second"))
    assert first.keys() == second.keys()
    coded = [name for name in first if name.endswith((".codes", ".scale"))]
    assert all(torch.equal(first[name], second[name]) for name in coded)
    assert any(not torch.equal(first[name], second[name]) for name in first.keys() - coded)
    compress.export_onnx(model, tmp_path / "onnx")


def test_codes_are_not_trained_unseen(tmp_path: Path, tiny_gpt2: Any) -> None:
    model = tiny_gpt2()
    compress.quantize_(model, weights=4)
    loaded = compress.load(compress.save(model, tmp_path / "saved")).requires_grad_(True)
    with pytest.raises(ModelError, match="model: was loaded from packed codes, which cannot train"):
        compress.finetune(loaded, rows_for(model), steps=1, progress=False)
    with torch.no_grad():
        loaded.transformer.h[0].mlp.c_fc.weight.mul_(2)
    with pytest.raises(ModelError, match=r"transformer\.h\.0\.mlp\.c_fc: its weight was changed after it was read"):
        compress.save(loaded, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_generation_settings_come_back(tmp_path: Path, tiny_gpt2: Any) -> None:
    model = tiny_gpt2()
    model.generation_config.max_new_tokens = 7
    compress.quantize_(model, weights=4)
    again = compress.load(compress.save(model, tmp_path / "saved"))
    assert again.generation_config.max_new_tokens == 7


def test_inputs_that_no_kernel_quantizes_are_refused(tmp_path: Path, tiny_gpt2: Any) -> None:
    model = tiny_gpt2()
    compress.quantize_(model, weights=8)
    for product in (module for module in model.modules() if isinstance(module, Product)):
        product.spec = product.spec.model_copy(update={"activations": "symmetric"})
    made = compress.save(model, tmp_path / "saved")
    with pytest.raises(
        ModelError, match="model: quantizes the inputs of linear layers per tensor, which no kernel computes"
    ):
        compress.export_onnx(made, tmp_path / "onnx")


def test_dequantize_needs_codes(tmp_path: Path, tiny_gpt2: Any) -> None:
    saved = compress.save(tiny_gpt2(), tmp_path / "saved")
    with pytest.raises(UserError, match="dequantize: would change nothing, .*saved contains no packed codes"):
        compress.load(saved, dequantize=True)
