"""Models of published size, with random weights: packed, they take the bytes that a paper counts.

QuantGPT (Tao et al. 2022, arXiv 2203.10705) reports 14.4x for GPT-2 and 13.4x for BART-base at 2-2-8, which follow from
bytes = (embedding + matrices) * bits / 8 + 4 * (positions + biases + normalizations): 32.92 and 39.61 MB, no scales.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import BartConfig, GPT2Config

from compress.models import family_of
from compress.models.loading import build
from compress.models.structure import stock_tensors
from compress.onnx.export.exporter import Packed, export
from compress.surgery.quantization import Quantization, Storage, packed_state, quantize

from .conftest import FLOAT16, FLOAT32

MB = 2**20
FILE_BYTES = 100_000
"""Upper bound for what a file holds besides tensors: names and shapes, or the nodes of a graph."""
GPT2_BASE_BYTES, BART_BASE_BYTES = 4 * 124_439_808, 4 * 139_420_416


def bart_settings(**sizes: int) -> dict[str, int]:
    """The same sizes for encoder and decoder, as a BART's configuration wants them."""
    return {f"{part}_{name}": size for part in ("encoder", "decoder") for name, size in sizes.items()}


BART_BASE = bart_settings(layers=6, attention_heads=12, ffn_dim=3072)
BART_CUT = bart_settings(layers=6, attention_heads=8, ffn_dim=2048)


def packed(config: Any, store: Storage = FLOAT32) -> tuple[nn.Module, Packed]:
    """A random model of this shape at 2-2-8; it is never initialised as a stock model is, which would take longer."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        model: Any = build(config)
    model.to_empty(device="cpu").tie_weights()
    with torch.no_grad():
        for tensor in stock_tensors(model):
            tensor.uniform_(-1, 1, generator=generator)
    settings = {"weights": {"bits": 2, "method": "round_to_nearest"}, "embedding": {"bits": 2}}
    quantize(model, family_of(config), Quantization.model_validate(settings))
    tensors, spec = packed_state(model, store)
    return model, Packed(spec, tensors)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "words", "matrices", "positions", "others", "megabytes"),
    [
        (GPT2Config(), 38_597_376, 84_934_656, 786_432, 121_344, 32.92),
        (BartConfig(d_model=768, **BART_BASE), 38_603_520, 99_090_432, 1_575_936, 150_528 + 50_265, 39.61),
    ],
    ids=["gpt2", "bart-base"],
)
def test_bytes_are_those_the_paper_counts(
    config: Any, words: int, matrices: int, positions: int, others: int, megabytes: float,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    counted = (words + matrices) * 2 / 8 + 4 * (positions + others)
    model, found = packed(config)
    scales = 4 * (config.vocab_size + sum(not matrix.shares for matrix in found.spec.matrices) - 1)
    assert sum(math.prod(tensor.shape) * tensor.itemsize for tensor in found.tensors.values()) == counted + scales
    save_file(dict(found.tensors), tmp_path / "quantized.safetensors")
    monkeypatch.setattr("compress.onnx.export.exporter.check_parity", lambda *_, **__: {})  # it takes a minute
    export(model, tmp_path, packed=found)
    for files in ("*.safetensors", "*.onnx*"):
        size = sum(file.stat().st_size for file in tmp_path.glob(files))
        assert counted + scales < size < counted + scales + FILE_BYTES, files
        assert size / MB == pytest.approx(megabytes, rel=0.02), files


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "base", "words", "matrices", "positions", "others", "ratio"),
    [
        (GPT2Config(n_embd=512, n_head=8), GPT2_BASE_BYTES, 25_731_584, 37_748_736, 524_288, 80_896, 28.5),
        (BartConfig(d_model=512, **BART_CUT), BART_BASE_BYTES, 25_735_680, 44_040_192, 1_050_624, 100_352, 27.5),
    ],
    ids=["gpt2-8/12", "bart-base-8/12"],
)
def test_two_thirds_at_two_bits_are_more_than_25_times_smaller(
    config: Any, base: int, words: int, matrices: int, positions: int, others: int, ratio: float,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Positions and the embedding's scales in float16; a bias of logits that is all zero is in no graph."""
    monkeypatch.setattr("compress.onnx.export.exporter.check_parity", lambda *_, **__: {})
    model, found = packed(config, FLOAT16)
    for buffer in model.buffers():
        buffer.zero_()
    lone = sum(not matrix.shares for matrix in found.spec.matrices) - 1
    counted = (words + matrices) * 2 / 8 + 2 * (positions + config.vocab_size) + 4 * (others + lone)
    export(model, tmp_path, packed=found)
    size = sum(file.stat().st_size for file in tmp_path.glob("*.onnx*"))
    assert counted < size < counted + FILE_BYTES
    assert base / size >= ratio > 25
