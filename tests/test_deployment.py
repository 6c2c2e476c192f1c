"""The comparison of deployed models: what it writes, what it skips, and that every side decodes the same tokens."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compress.artifact import adopt
from compress.measure.torch_stepper import TorchStepper
from compress.measure.workload import OnnxStepper, Workload

ROOT = Path(__file__).parents[1]
SIZES = {"layers": 1, "hidden": 48, "heads": 6, "vocabulary": 97, "positions": 32}
TINY = [f"--{name}={value}" for name, value in SIZES.items()]
SHORT = ["--prompt=6", "--past=4", "--new-tokens=3", "--threads=1", "--rounds=2"]
OWN = {"float", "8-8-8", "4-4-8", "2-2-8", "8of12-float", "8of12-2-2-8", "6of12-float", "6of12-2-2-8"}
STOCK = {"optimum-float", "ort-dynamic-int8", "ort-dynamic-int8-untied", "ort-matmul-4bits"}
WORK = Workload(prompt=6, new_tokens=4, batch=1, threads=1, vocabulary=97)


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Import a file of ``benchmarks/`` as its scripts do."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(ROOT / "benchmarks")):
            del sys.modules[name]


def script(name: str, *options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "benchmarks" / f"{name}.py", *map(str, options)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def within(result: dict[str, Any], goals: dict[str, Any], at_most: frozenset[str]) -> bool:
    """Every figure is held to its goal, and says rightly whether it is within."""
    for kind in set(goals) & set(result):
        for name, figure in result[kind].items():
            bound = goals[kind][name]
            assert figure["bound"] == bound
            assert figure["within"] == (figure["value"] <= bound if kind in at_most else figure["value"] >= bound)
    return all(figure["within"] for kind in set(goals) & set(result) for figure in result[kind].values())


@pytest.mark.slow
@pytest.mark.parametrize("model", ["gpt2", "bart"])
def test_own_graphs_beside_torch(model: str, benchmarks: Any, tmp_path: Path) -> None:
    options = (f"--model={model}", *TINY, *SHORT, f"--keep={tmp_path}", f"--out={tmp_path / 'out.json'}")
    done = script("deployment", *options, "--peers=torch,ctranslate2,llama.cpp")
    result = json.loads(done.stdout)
    assert json.loads((tmp_path / "out.json").read_text()) == result
    assert OWN | {"torch", "torch-8of12", "torch-6of12"} <= set(result["contenders"])
    assert result["conditions"]["memory_bytes_per_s"] > 1e8
    for name in OWN:
        found = result["contenders"][name]
        assert found["bytes"] == sum(file.stat().st_size for file in (tmp_path / model / name).glob("*.onnx*"))
        for times in ("prefill_ms", "per_token_ms"):
            assert 0 < found[times]["p50"] <= found[times]["p95"]
        assert found["load_s"] > 0 and found["peak_rss_bytes"] > 2**20
        assert found["above_floor"] == pytest.approx(found["per_token_ms"]["p50"] / found["floor_ms"])
    for peer, reason in result["skipped"].items():
        assert f"skipped: {peer} ({reason})" in done.stderr
    goals = benchmarks("goals")
    assert set(result) & set(goals.GOALS[model]) >= {"megabytes", "smaller"}
    assert "prefill_than_optimum" not in result  # nothing to compare with was asked for
    reached = within(result, goals.GOALS[model], goals.AT_MOST)
    assert done.returncode == (0 if reached else 1), done.stderr
    smaller = result["smaller"]["8of12-2-2-8"]
    assert smaller["value"] == 4 * result["conditions"]["parameters"] / result["contenders"]["8of12-2-2-8"]["bytes"]
    assert f"smaller.8of12-2-2-8: {smaller['value']:.3f} is beyond the bound of 25" in done.stderr

    if model == "bart":
        return
    again = script("deployment", *options, "--peers=none")
    assert "making" in done.stderr and "making" not in again.stderr
    assert set(json.loads(again.stdout)["contenders"]) == OWN


@pytest.mark.slow
@pytest.mark.optimum
@pytest.mark.parametrize("model", ["gpt2", "bart"])
def test_stock_graphs_decode_what_torch_does(model: str, benchmarks: Any, tmp_path: Path) -> None:
    pytest.importorskip("optimum.exporters.onnx", exc_type=ImportError)
    shape = benchmarks("own_models").Shape(model=model, **SIZES)
    found = {each.name: each for each in benchmarks("stock_graphs").stock_graphs(shape, tmp_path, threads=1)}
    assert set(found) == STOCK
    alone = model == "gpt2"
    opened = OnnxStepper if alone else benchmarks("stock_seq2seq").Stepper
    sides = TorchStepper(adopt(tmp_path / "stock"), "cpu"), opened(tmp_path / "optimum-float", 1)
    assert tokens(sides[0]) == tokens(sides[1])
    for each in found.values():
        assert len(each.open()(WORK).steps) == WORK.new_tokens
        assert each.fresh(WORK)["peak_rss_bytes"] > 2**20
    float_bytes, int8_bytes = (found[name].step_bytes() for name in ("optimum-float", "ort-dynamic-int8"))
    assert int8_bytes < float_bytes / 2


def tokens(stepper: Any) -> list[int]:
    stepper.prefill(WORK.ids(), WORK.new_tokens)
    chosen = [int(np.asarray(stepper._tokens)[0, 0])]
    for _ in range(WORK.new_tokens):
        stepper.step()
        chosen.append(int(np.asarray(stepper._tokens)[0, 0]))
    return chosen


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("--peers=torch,nobody", "error: --peers: 'nobody' is unknown; allowed: all, none, or torch,"),
        ("--heads=5", "error: --heads: 5 is no multiple of 6 that divides --hidden 48"),
    ],
)
def test_mistakes_are_told_in_one_line(option: str, told: str, tmp_path: Path) -> None:
    done = script("deployment", *TINY, *SHORT, f"--keep={tmp_path}", option)
    assert done.returncode == 2
    assert done.stderr.startswith(told)
    assert len(done.stderr.splitlines()) == 1


def test_kept_models_of_another_shape_are_refused(benchmarks: Any, tmp_path: Path) -> None:
    own_models = benchmarks("own_models")
    own_models.claim(own_models.Shape(model="gpt2", **SIZES), tmp_path)
    own_models.claim(own_models.Shape(model="gpt2", **SIZES), tmp_path)
    with pytest.raises(Exception, match="--keep: .* holds models of another shape"):
        own_models.claim(own_models.Shape(model="gpt2", **{**SIZES, "layers": 2}), tmp_path)


def test_without_a_gpu_nothing_is_measured() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "gpu.py"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "skipped: gpu (no CUDA device)\n")


@pytest.mark.slow
def test_the_gpu_comparison_on_a_cpu(tmp_path: Path) -> None:
    sizes = ("--prompt=4", "--new-tokens=2", "--rounds=2", "--batches", "1", "2", "--modes", "eager")
    done = script("gpu", *TINY, "--device=cpu", f"--keep={tmp_path}", *sizes)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    names = {f"{size} eager, batch {batch}" for size in ("whole", "8of12", "6of12") for batch in (1, 2)}
    assert set(result["contenders"]) == set(result["step_ms"]) == names
    assert result["times_as_fast_as_whole_eager"]["whole eager, batch 2"] == 1


@pytest.mark.slow
def test_a_provider_decodes_what_torch_does(benchmarks: Any, tmp_path: Path) -> None:
    own_models, provider, gpu = benchmarks("own_models"), benchmarks("ort_provider"), benchmarks("gpu")
    source = own_models.stock(own_models.Shape(model="gpt2", **SIZES), tmp_path)
    options = type("Options", (), {"device": "cpu", "model": "gpt2"})
    gpu.on_provider(source, options)
    stepper = provider.Stepper(tmp_path / "stock-plain", "cpu")
    chosen = []
    stepper.prefill(WORK.ids(), WORK.new_tokens)
    for _ in range(WORK.new_tokens):
        chosen.append(int(stepper.tokens[0, 0]))
        stepper.step()
    assert [*chosen, int(stepper.tokens[0, 0])] == tokens(TorchStepper(adopt(source), "cpu"))
