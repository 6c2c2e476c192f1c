"""The exported directory in other hands: torch's exporter agrees, and optimum opens it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from compress.onnx.runtime import Runtime


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_plain_graph_is_an_oracle(exported: Callable[..., Any], tmp_path: Any, family: str) -> None:
    plain = exported(graph="plain", family=family, layers=1)
    size = (plain.directory / "model.onnx").stat().st_size
    assert size <= 4 * sum(parameter.numel() for parameter in plain.model.parameters()) + 60_000
    assert plain.figures["max_logit_error"] < 1e-5
    text = (plain.directory / "model.onnx").read_bytes()
    assert b"site-packages" not in text
    assert not plain.graph.metadata_props
    assert not plain.model.training

    plain.directory.rename(tmp_path / "plain")
    decoding = exported(model=plain.model)
    ids = np.random.default_rng(0).integers(0, 67, (2, 11))
    mask = np.array([[1] * 11, [0] * 4 + [1] * 7])
    both = [Runtime.open(path).logits(ids, mask)[mask == 1] for path in (tmp_path / "plain", decoding.directory)]
    np.testing.assert_allclose(*both, atol=1e-5)


@pytest.mark.slow
@pytest.mark.optimum
@pytest.mark.parametrize("bits", [0, 4])
@pytest.mark.parametrize(
    "options",
    [
        *({}, {"family": "llama", "kv_heads": 4}, {"family": "llama", "kv_heads": 2, "tie": True}),
        {"family": "llama", "kv_heads": 1, "hidden": 24},
    ],
    ids=str,
)
def test_optimum_generates_the_same_text(exported: Callable[..., Any], bits: int, options: dict[str, Any]) -> None:
    optimum = pytest.importorskip("optimum.onnxruntime", exc_type=ImportError)
    found = exported(bits, **options)
    model = optimum.ORTModelForCausalLM.from_pretrained(found.directory)
    ids = torch.from_numpy(np.random.default_rng(0).integers(1, 67, (2, 6)))
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=16, do_sample=False, eos_token_id=66)
    got = Runtime.open(found.directory).generate(ids.numpy(), mask.numpy(), max_new_tokens=16, eos_token_id=66)
    ended = np.cumsum(np.cumsum(got[:, 6:] == 66, axis=1), axis=1) > 1
    assert np.where(ended, expected[:, 6:], got[:, 6:]).tolist() == expected[:, 6:].tolist()
