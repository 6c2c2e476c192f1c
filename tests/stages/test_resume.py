"""Stages that draw at random or learn beside gradients: interrupted + resumed == straight, bit for bit."""

from __future__ import annotations

import signal
from typing import Any

import pytest

from compress.training.objective import Objective

TRAIN = {"steps": 6, "batch": 8, "lr": 1e-2, "precision": "fp32", "dropout": 0, "eval_every": 3, "keep": "last"}
QUANTIZE = {"type": "quantize", "embedding": {"bits": 2}, "train": TRAIN}
CONTRASTIVE = {"type": "token_contrastive", "size": 8, "weight": 10.0}

STAGES = {
    "running squares": QUANTIZE | {"weights": {"bits": 2, "method": "laq"}, "terms": ["cross_entropy"]},
    "weights left as they are": QUANTIZE | {"weights": {"bits": 2}, "noise_p": 0.5, "terms": ["cross_entropy"]},
    "drawn negatives": QUANTIZE
    | {"weights": {"bits": 2}, "teacher": "base", "terms": [CONTRASTIVE | {"num_negatives": 2, "momentum": 0.0}]},
    "memory bank": QUANTIZE | {"weights": {"bits": 2}, "teacher": "base", "terms": [CONTRASTIVE | {"momentum": 0.9}]},
    "dropout": {"type": "distill", "teacher": "base", "terms": ["adaptive_kl"], "train": TRAIN | {"dropout": 0.2}},
}
"""Each with one thing alone that a checkpoint must carry besides parameters and optimizer."""


@pytest.mark.slow
@pytest.mark.parametrize("config", STAGES.values(), ids=STAGES)
def test_interrupted_and_resumed_is_straight(
    config: dict[str, Any], tiny_gpt2: Any, stock: Any, learnable: Any, run_stage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"layers": 1, "hidden": 16, "ffn": 32, "vocab": 23}
    student, teacher = stock(tiny_gpt2(**sizes), "student"), stock(tiny_gpt2(**sizes, seed=1), "teacher")
    settings = {"data": learnable(student), "models": {"base": teacher}}
    straight = run_stage(config, student, out="straight", **settings)
    calls, original = {"n": 0}, Objective.forward

    def interrupted(self: Objective, batch: Any) -> Any:
        calls["n"] += 1
        if calls["n"] == 4:
            signal.raise_signal(signal.SIGINT)
        return original(self, batch)

    monkeypatch.setattr(Objective, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_stage(config, student, out="resumed", **settings)
    resumed = run_stage(config, student, out="resumed", **settings)
    assert calls["n"] == 6  # four steps before the interruption, two after it
    assert resumed.digest == straight.digest
