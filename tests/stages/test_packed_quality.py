"""What a packed graph scores is what torch scores with fake quantization, on the shipped teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from compress.artifact import adopt
from compress.data import DataSpec, ModelInterface, open_data
from compress.measure.quality import Quality

QUICKSTART = Path(__file__).parents[2] / "recipes/quickstart"
HELD_OUT = {"text": "shakespeare.txt", "strip": True, "skip": 37000, "limit": 300}


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 4])
def test_perplexity_of_the_packed_graph_is_that_of_torch(bits: int, run_stage: Any) -> None:
    teacher = adopt(QUICKSTART / "teacher")
    tokenizer = teacher.tokenizer()
    interface = ModelInterface.of(teacher.config(), tokenizer)
    spec = DataSpec.model_validate({"test": HELD_OUT, "block": 128})
    data = open_data(spec, tokenizer=tokenizer, model=interface, base=QUICKSTART)
    config = {"type": "quantize", "weights": {"bits": bits}, "embedding": {"bits": bits}, "train": {"steps": 0}}
    small = run_stage(config, teacher, out="small")
    graph = run_stage({"type": "export_onnx"}, small, out="graph")
    found = Quality().run({"torch": small, "graph": graph}, data=data, device="cpu", console=None)
    assert [record["conditions"]["quality"]["runtime"] for record in found.values()] == ["torch", "onnxruntime"]
    torch, onnx = (record["quality"] for record in found.values())
    assert torch["tokens"] == onnx["tokens"] > 2000
    assert onnx["perplexity"] == pytest.approx(torch["perplexity"], rel=1e-3)
