"""Speed: the schema, interleaving, threads, limits, and a peak that is the process's own."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from compress.artifact import Artifact, adopt, seal
from compress.artifact import Step as Lineage
from compress.errors import CompressError, UserError
from compress.measure import speed as module
from compress.measure.peak import measure_in_fresh_process, peak_rss
from compress.measure.speed import Speed
from compress.measure.torch_stepper import TorchStepper
from compress.measure.workload import OnnxStepper, Times, Workload, timed_pass
from compress.onnx.export.exporter import export
from compress.stages.export_onnx import ExportOnnx
from compress.stages.stage import Context
from compress.surgery.quantization import QuantizationSpec

WORK = Workload(prompt=5, new_tokens=4, batch=2, threads=1, vocabulary=67)


@pytest.fixture
def artifacts(tmp_path: Path, tiny_gpt2: Any) -> dict[str, Artifact]:
    tiny_gpt2().save_pretrained(tmp_path / "base")
    base = adopt(tmp_path / "base")
    (tmp_path / "partial").mkdir()
    result = ExportOnnx().run(base, tmp_path / "partial", Context(models={}))
    step = Lineage(stage="s", type="s", version=1, config={}, seed=0, inputs={}, packages={}, seconds=0.0)
    traits, kept = sorted(result.traits), result.kept
    onnx = seal(tmp_path / "partial", tmp_path / "onnx", parent=base, traits=traits, step=step, kept=kept)
    return {"base": base, "onnx": onnx}


@pytest.fixture
def no_fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"load_s": 0.5, "peak_rss_bytes": 1}
    monkeypatch.setattr(module, "measure_in_fresh_process", lambda directory, kind, work: found)


@pytest.mark.slow
@pytest.mark.usefixtures("no_fresh_process")
def test_the_record(artifacts: dict[str, Artifact]) -> None:
    before = torch.get_num_threads()
    speed = Speed(prompt_tokens=6, new_tokens=3, batch=2, threads=1, rounds=2)
    records = speed.run(artifacts, data=None, device="cpu", console=None)
    assert torch.get_num_threads() == before
    assert set(records) == {"base", "onnx"}
    for record in records.values():
        found = record["speed"]
        times = {"prefill_ms", "per_token_ms", "tokens_per_s", "load_s", "peak_rss_bytes", "gpu"}
        assert set(found) == times | {"weight_bytes_per_token", "floor_ms", "above_floor"}
        bandwidth = record["conditions"]["speed"]["memory_bytes_per_s"]
        assert found["floor_ms"] == pytest.approx(1000 * found["weight_bytes_per_token"] / bandwidth, rel=1e-6)
        assert found["above_floor"] == pytest.approx(found["per_token_ms"]["p50"] / found["floor_ms"])
        for name in ("prefill_ms", "per_token_ms"):
            assert 0 < found[name]["p50"] <= found[name]["p95"]
        assert found["gpu"] == "not measured: no CUDA device"
    assert [record["conditions"]["speed"]["runtime"] for record in records.values()] == ["torch eager", "onnxruntime"]
    conditions = records["onnx"]["conditions"]["speed"]
    assert (conditions["prompt_tokens"], conditions["new_tokens"], conditions["batch"]) == (6, 3, 2)
    assert (conditions["threads"], conditions["rounds"]) == (1, 2)


def test_conditions_say_where_quantization_is_emulated(artifacts: dict[str, Artifact]) -> None:
    spec = QuantizationSpec(matrices=())
    quantized = {
        name: replace(artifact, manifest=artifact.manifest.model_copy(update={"quantization": spec}))
        for name, artifact in artifacts.items()
    }
    found = [module._runtime(quantized[name]) for name in ("base", "onnx")]
    assert found == ["torch eager, quantization emulated in float32", "onnxruntime"]


@pytest.mark.slow
@pytest.mark.usefixtures("no_fresh_process")
def test_rounds_are_interleaved_and_the_first_is_not_counted(
    artifacts: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []

    def fake(stepper: Any, work: Workload) -> Times:
        order.append(stepper.runtime)
        slow = len(order) <= 2
        return Times(100.0 if slow else 0.010, (100.0 if slow else 0.002,) * work.new_tokens)

    monkeypatch.setattr(module, "timed_pass", fake)
    records = Speed(prompt_tokens=2, new_tokens=2, batch=3, threads=1, rounds=3).run(
        artifacts, data=None, device="cpu", console=None
    )
    assert order == ["torch eager", "onnxruntime"] * 4
    assert records["base"]["speed"]["prefill_ms"] == pytest.approx({"p50": 10, "p95": 10})
    assert records["base"]["speed"]["per_token_ms"] == pytest.approx({"p50": 2, "p95": 2})
    assert records["base"]["speed"]["tokens_per_s"] == pytest.approx(3 / 0.002)


def test_both_runtimes_do_the_same_work(artifacts: dict[str, Artifact]) -> None:
    torch_side, onnx_side = TorchStepper.of(artifacts["base"], "cpu"), OnnxStepper(artifacts["onnx"].path, threads=1)
    for stepper in (torch_side, onnx_side):
        times = timed_pass(stepper, WORK)
        assert times.prefill > 0
        assert len(times.steps) == 4
    assert torch_side._tokens.tolist() == onnx_side._tokens.tolist()
    assert torch_side._cache.get_seq_length() == onnx_side._decoding._length == 9


@pytest.mark.slow
def test_an_encoder_decoder_steps_too(tmp_path: Path, tiny_bart: Any) -> None:
    model = tiny_bart()
    with torch.no_grad():
        model.final_logits_bias.zero_()  # or it alone decides which token is chosen
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.dim() > 1 else 1)
    model.save_pretrained(tmp_path / "bart")
    model.generation_config.eos_token_id = None  # a measurement does not stop at it
    ids = torch.from_numpy(WORK.ids())
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)[:, 1:]
    export(model, copied(tmp_path / "bart", tmp_path / "onnx"))
    steppers: list[Any] = [
        TorchStepper.of(adopt(tmp_path / "bart"), "cpu"), OnnxStepper(tmp_path / "onnx", threads=1),
    ]  # fmt: skip
    for stepper in steppers:
        stepper.prefill(WORK.ids(), WORK.new_tokens)
        chosen = [np.asarray(stepper._tokens)]
        for _ in range(WORK.new_tokens):
            stepper.step()
            chosen.append(np.asarray(stepper._tokens))
        assert np.concatenate(chosen, axis=1).tolist() == expected.tolist()
    assert len(expected.unique()) > 1 and not torch.equal(expected[0], expected[1])


def copied(source: Path, out: Path) -> Path:
    """A directory with the configs of another."""
    out.mkdir()
    for file in source.glob("*.json"):
        shutil.copyfile(file, out / file.name)
    return out


@pytest.mark.slow
def test_load_and_peak_come_from_a_fresh_process(artifacts: dict[str, Artifact]) -> None:
    ballast = np.ones(400 * 2**20, np.uint8)
    found = measure_in_fresh_process(artifacts["onnx"].path, "onnx", WORK)
    assert found["load_s"] > 0
    assert 20 * 2**20 < found["peak_rss_bytes"] < 250 * 2**20
    assert peak_rss() > ballast.nbytes
    assert found["peak_rss_bytes"] < peak_rss()


@pytest.mark.slow
def test_the_torch_side_loads_in_a_fresh_process(artifacts: dict[str, Artifact]) -> None:
    found = measure_in_fresh_process(artifacts["base"].path, "torch", WORK)
    assert found["peak_rss_bytes"] > 100 * 2**20


@pytest.mark.slow
def test_a_failing_process_is_reported_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(CompressError, match=r"peak memory could not be measured \(.*there is no such file"):
        measure_in_fresh_process(tmp_path, "onnx", WORK)


@pytest.mark.slow
def test_an_export_is_measured_without_torch(artifacts: dict[str, Artifact]) -> None:
    script = "import sys; import compress.measure.peak; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parents[2], check=True
    )
    assert done.stdout.strip() == "set()"


def test_the_context_is_checked(artifacts: dict[str, Artifact]) -> None:
    with pytest.raises(UserError, match="prompt_tokens 60 and new_tokens 5 exceed the 64 positions of base"):
        Speed(prompt_tokens=60, new_tokens=5).run(artifacts, data=None, device="cpu", console=None)


@pytest.mark.parametrize("field", ["prompt_tokens", "new_tokens", "batch", "threads", "rounds"])
def test_numbers_start_at_one(field: str) -> None:
    with pytest.raises(ValidationError, match=field):
        Speed.model_validate({field: 0})
