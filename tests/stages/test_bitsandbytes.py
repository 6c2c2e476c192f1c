"""The bitsandbytes baseline really quantizes both families, saves, and reloads to the same values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from compress.artifact import Artifact, adopt
from compress.errors import NothingDoneError
from compress.models.bnb import load_bitsandbytes
from compress.models.loading import load_stock
from compress.stages import bitsandbytes as stage_module
from compress.stages.bitsandbytes import BitsAndBytes
from compress.stages.stage import Context, Shape


def saved(tmp_path: Path, request: pytest.FixtureRequest, family: str) -> Artifact:
    request.getfixturevalue(f"tiny_{family}")(hidden=64, ffn=128).save_pretrained(tmp_path / "base")
    return adopt(tmp_path / "base")


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})
    with torch.no_grad():
        found: torch.Tensor = model(**inputs).logits
    return found


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "bart"])
@pytest.mark.parametrize(("quant_type", "worst", "factor"), [("nf4", 0.5, 4), ("fp4", 0.8, 4), ("int8", 0.1, 2)])
def test_quantizes_saves_and_reloads(
    tmp_path: Path, request: pytest.FixtureRequest, family: str, quant_type: Any, worst: float, factor: int
) -> None:
    base = saved(tmp_path, request, family)
    out = tmp_path / "out"
    result = BitsAndBytes(quant_type=quant_type).run(base, out, Context(models={}))
    coverage, products = result.coverage, {"gpt2": 8, "bart": 32}[family]
    assert result.traits == {"bitsandbytes"} and coverage.modules_touched == products
    assert coverage.bytes_before - coverage.bytes_after > coverage.parameters_touched * 4 * (1 - 1 / factor)
    assert (out / "model.safetensors").stat().st_size < 0.9 * (base.path / "model.safetensors").stat().st_size
    ids = torch.arange(3, 19)[None]
    reloaded = logits(load_stock(out, device="cpu"), ids)
    assert torch.equal(reloaded, logits(load_bitsandbytes(base.path, quant_type), ids))
    exact = logits(base.model(), ids)
    error = (reloaded - exact).std() / exact.std()
    assert 0 < error < worst


def test_widths_that_4_bits_cannot_compute_are_refused(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue("tiny_gpt2")(hidden=144, heads=6).save_pretrained(tmp_path / "base")
    base = adopt(tmp_path / "base")
    shape = Shape(name="base", config=base.config(), sizes=base.sizes(), traits=frozenset(), root="base")
    found = next(BitsAndBytes().problems(shape, None))
    assert str(found) == "quant_type: nf4 needs widths that are multiples of 64, and hidden is 144 wide; use int8"
    assert not list(BitsAndBytes(quant_type="int8").problems(shape, None))


@pytest.mark.slow
def test_touching_nothing_raises(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = saved(tmp_path, request, "gpt2")
    monkeypatch.setattr(stage_module, "bitsandbytes_products", lambda model: [])
    with pytest.raises(NothingDoneError, match="nf4"):
        BitsAndBytes().run(base, tmp_path / "out", Context(models={}))


def test_sizes_that_stock_classes_cannot_express_are_refused(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    base = saved(tmp_path, request, "gpt2")
    shape = Shape(name="base", config=base.config(), sizes=base.sizes(), traits=frozenset(), root="base")
    assert not list(BitsAndBytes().problems(shape, None))
    uneven = {**base.sizes(), "layer.0.heads": 3}
    odd = Shape(name="base", config=base.config(), sizes=uneven, traits=frozenset({"pruned"}), root="base")
    assert "transformers classes" in next(BitsAndBytes().problems(odd, None)).text
