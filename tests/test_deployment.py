"""The comparison of deployed models: what it writes, what it skips, and that every side decodes the same tokens."""

from __future__ import annotations

import functools
import importlib
import json
import os
import shutil
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
    sides = TorchStepper.of(adopt(tmp_path / "stock"), "cpu"), opened(tmp_path / "optimum-float", 1)
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--peers=torch,nobody", "error: --peers: 'nobody' is unknown; allowed: all, none, or torch,"),
        ("--heads=5", "error: --heads: 5 is not a multiple of 6 that divides --hidden 48"),
    ],
)
def test_mistakes_are_reported_in_one_line(option: str, message: str, tmp_path: Path) -> None:
    done = script("deployment", *TINY, *SHORT, f"--keep={tmp_path}", option)
    assert done.returncode == 2
    assert done.stderr.startswith(message)
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        ("deployment", "--past=4 --new-tokens=29", "--past with --new-tokens: 33 tokens exceed --positions 32"),
        ("deployment", "--prompt=33", "--prompt: 33 tokens exceed --positions 32"),
        ("deployment", "--model=bart --prompt=33", "--prompt: 33 tokens exceed --positions 32"),
        ("deployment", "--model=bart --new-tokens=33", "--new-tokens: 33 tokens exceed --positions 32"),
        ("deployment", "--model=bart --new-tokens=1", "--new-tokens: 1 leaves no token after the first to time"),
        ("deployment", "--new-tokens=0", "--new-tokens: '0' is not a whole number of at least 1"),
        ("deployment", "--past=0", "--past: '0' is not a whole number of at least 1"),
        ("deployment", "--heads=0", "--heads: '0' is not a whole number of at least 1"),
        (
            "deployment",
            "--out=/nonexistent/x.json",
            "--out: /nonexistent/x.json is not a file in an existing, writable directory",
        ),
        ("deployment", "--keep=/dev/null/models", "--keep: /dev/null/models is not a directory that can be made"),
        ("gpu", "--new-tokens=0", "--new-tokens: '0' is not a whole number of at least 1"),
        ("gpu", "--batches 1 0", "--batches: '0' is not a whole number of at least 1"),
        ("gpu", "--prompt=30 --new-tokens=3", "--prompt with --new-tokens: 33 tokens exceed --positions 32"),
        ("gpu", "--model=bart --prompt=33 --new-tokens=3", "--prompt: 33 tokens exceed --positions 32"),
        ("gpu", "--model=bart --prompt=30 --new-tokens=32", "--new-tokens: 33 tokens exceed --positions 32"),
        ("gpu", "--keep=/dev/null/models", "--keep: /dev/null/models is not a directory that can be made"),
    ],
)
def test_what_cannot_be_timed_is_reported_before_models_are_made(
    benchmarks: Any, capsys: pytest.CaptureFixture[str], script: str, options: str, message: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        benchmarks(script).parse([*TINY, "--prompt=6", "--new-tokens=3", *options.split()])
    line = capsys.readouterr().err
    assert stopped.value.code == 2
    assert line.startswith(f"error: {message}") and line.count("\n") == 1


def test_what_just_fits_is_timed(benchmarks: Any) -> None:
    for options in ("--past=4 --new-tokens=28 --prompt=32", "--model=bart --prompt=32 --new-tokens=32"):
        assert benchmarks("deployment").parse([*TINY, "--prompt=6", "--new-tokens=3", *options.split()]).positions == 32
    for options in ("--prompt=29 --new-tokens=3", "--model=bart --prompt=32 --new-tokens=31"):
        assert benchmarks("gpu").parse([*TINY, "--prompt=6", "--new-tokens=3", *options.split()]).positions == 32


def test_goals_are_those_of_the_results_page(benchmarks: Any) -> None:
    """Kinds and contenders of every goal; a figure that was dropped or loosened is seen here."""
    found = benchmarks("goals").GOALS
    assert {model: {kind: dict(goals) for kind, goals in kinds.items()} for model, kinds in found.items()} == {
        "gpt2": {
            "megabytes": {"2-2-8": 33.5, "4-4-8": 63.5, "8-8-8": 122.5},
            "smaller": {"8of12-2-2-8": 25},
            "decode_than_optimum": {
                "8-8-8": 3.8,
                "4-4-8": 5.8,
                "2-2-8": 7.5,
                "6of12-float": 2.5,
                "8of12-2-2-8": 17,
                "6of12-2-2-8": 22,
            },
            "decode_than_stock_int8": {"2-2-8": 2.7},
            "decode_than_ctranslate2": {"2-2-8": 6},
            "decode_than_llama": {"2-2-8": 1},
            "prefill_than_optimum": dict.fromkeys(("8-8-8", "4-4-8", "2-2-8"), 1),
            "above_floor": {"2-2-8": 2},
            "peak_memory": {"2-2-8": 1 / 3},
            "export_seconds": dict.fromkeys(("float", "8-8-8", "4-4-8", "2-2-8"), 60),
        },
        "bart": {
            "megabytes": {"2-2-8": 40.5, "4-4-8": 73.5, "8-8-8": 139.5},
            "smaller": {"8of12-2-2-8": 25},
            "generate_than_optimum": {"8-8-8": 2.5, "4-4-8": 4, "2-2-8": 5, "6of12-float": 2.5, "8of12-2-2-8": 9},
            "generate_than_stock_int8": {"2-2-8": 2.5},
            "generate_than_ctranslate2": {"2-2-8": 3},
            "generate_than_torch": {"6of12-float": 6.96},
            "prefill_than_optimum": dict.fromkeys(("8-8-8", "4-4-8", "2-2-8"), 1),
            "peak_memory": {"2-2-8": 1 / 3},
            "export_seconds": dict.fromkeys(("float", "8-8-8", "4-4-8", "2-2-8"), 60),
        },
    }
    assert benchmarks("goals").CUT_ON_GPU == {"6of12": 1.51}


RECORD = {"megabytes": 30.0, "bytes": 30, "above_floor": 1.5, "peak_rss_bytes": 3, "packing_s": 1, "writing_s": 2}


def figures_of(benchmarks: Any, model: str, milliseconds: dict[str, tuple[float, float]]) -> dict[str, Any]:
    """Of contenders whose prompt and token took this long, in two rounds, the second one three times as long."""
    timed = importlib.import_module("compress.measure.workload").Times
    works = ("generate",) if model == "bart" else ("prefill", "decode")
    rounds = [
        {
            name: {work: timed(slower * prompt, (slower * token,) * 2) for work in works}
            for name, (prompt, token) in milliseconds.items()
        }
        for slower in (1, 3)
    ]
    found = benchmarks("deployment").figures(model, rounds, dict.fromkeys(milliseconds, RECORD), 300)
    return {f"{kind}.{name}": figure for kind, name, figure in found}


def test_each_peer_has_its_goal(benchmarks: Any) -> None:
    found = figures_of(
        benchmarks,
        "gpt2",
        {
            "2-2-8": (10.0, 1.0),
            "optimum-float": (20.0, 8.0),
            "ctranslate2-int8": (5.0, 5.0),
            "ctranslate2-float32": (5.0, 2.0),
            "llama.cpp-Q4_0": (5.0, 3.0),
            "llama.cpp-TQ2_0": (5.0, 0.5),
        },
    )
    ctranslate2, llama = found["decode_than_ctranslate2.2-2-8"], found["decode_than_llama.2-2-8"]
    assert (ctranslate2["value"], ctranslate2["than"], ctranslate2["within"]) == (5.0, "ctranslate2-int8", False)
    assert (llama["value"], llama["than"], llama["within"]) == (0.5, "llama.cpp-TQ2_0", False)
    assert found["prefill_than_optimum.2-2-8"]["value"] == 2.0
    assert "decode_than_stock_int8.2-2-8" not in found


def test_an_encoder_and_its_decoder_have_goals_of_prompt_and_memory(benchmarks: Any) -> None:
    found = figures_of(benchmarks, "bart", {"2-2-8": (4.0, 1.0), "optimum-float": (8.0, 5.0)})
    assert found["prefill_than_optimum.2-2-8"]["value"] == 2.0
    assert found["generate_than_optimum.2-2-8"]["value"] == 18 / 6
    assert found["peak_memory.2-2-8"]["value"] == 1.0 and not found["peak_memory.2-2-8"]["within"]
    assert found["export_seconds.2-2-8"]["value"] == 3.0
    assert not any("ctranslate2" in name for name in found)
    found = figures_of(benchmarks, "bart", {"2-2-8": (4.0, 1.0), "ctranslate2-int8": (8.0, 5.0)})
    assert found["generate_than_ctranslate2.2-2-8"]["value"] == 18 / 6
    assert "peak_memory.2-2-8" not in found


def test_kept_models_of_other_code_are_made_anew(
    benchmarks: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    contender = benchmarks("contender")
    count = iter(range(9))

    def make(out: Path) -> dict[str, int]:
        assert not list(out.iterdir())  # nothing stale lies beside what is new
        (out / "model").write_text("")
        return {"at": next(count)}

    place = tmp_path / "float"
    assert contender.finished(place, make) == contender.finished(place, make) == {"at": 0}
    assert capsys.readouterr().err == "making float\n"
    monkeypatch.setattr(contender, "made_by", lambda make: "another")
    assert contender.finished(place, make) == contender.finished(place, make) == {"at": 1}
    assert capsys.readouterr().err == "float was made by other code and is made again\nmaking float\n"
    (place / "made.json").write_text("{}")  # as before digests were noted
    assert contender.finished(place, make) == {"at": 2}


@pytest.mark.parametrize(
    "changed", ["onnx/export/operators.py", "surgery/quantization/spec.py", "models/families/gpt2.py", None]
)
def test_a_change_of_code_changes_what_models_are_made_by(
    benchmarks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str | None
) -> None:
    contender = benchmarks("contender")
    package = tmp_path / "compress"
    shutil.copytree(ROOT / "compress", package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(contender.compress, "__file__", str(package / "__init__.py"))
    before = contender.made_by(within)
    assert before.startswith(contender.compress.__version__)
    if changed:
        with (package / changed).open("a") as file:
            file.write("# other\n")
    assert (contender.made_by(within) == before) == (changed is None)
    assert contender.made_by(functools.partial(within, {})) == contender.made_by(within)
    assert contender.made_by(contender.chosen) != contender.made_by(within)  # another file makes it


def test_kept_models_of_another_shape_are_refused(benchmarks: Any, tmp_path: Path) -> None:
    own_models = benchmarks("own_models")
    own_models.claim(own_models.Shape(model="gpt2", **SIZES), tmp_path)
    own_models.claim(own_models.Shape(model="gpt2", **SIZES), tmp_path)
    with pytest.raises(Exception, match="--keep: .* contains models of another shape"):
        own_models.claim(own_models.Shape(model="gpt2", **{**SIZES, "layers": 2}), tmp_path)


@pytest.mark.slow
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
    gpu.on_provider(source, "", options)
    stepper = provider.Stepper(tmp_path / "stock-plain", "cpu")
    chosen = []
    stepper.prefill(WORK.ids(), WORK.new_tokens)
    for _ in range(WORK.new_tokens):
        chosen.append(int(stepper.tokens[0, 0]))
        stepper.step()
    assert [*chosen, int(stepper.tokens[0, 0])] == tokens(TorchStepper.of(adopt(source), "cpu"))


@pytest.mark.slow
def test_a_packed_graph_is_timed_where_its_work_is_on_the_device(
    benchmarks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_models, provider, gpu = benchmarks("own_models"), benchmarks("ort_provider"), benchmarks("gpu")
    source = own_models.stock(own_models.Shape(model="gpt2", **SIZES), tmp_path)
    options = type("Options", (), {"device": "cpu", "model": "gpt2"})
    assert len(gpu.on_provider(source, "2-2-8", options)(WORK).steps) == WORK.new_tokens
    stepper, ours = provider.Stepper(tmp_path / "stock-2-2-8", "cpu"), OnnxStepper(tmp_path / "stock-2-2-8", 1)
    for each in (stepper, ours):
        each.prefill(WORK.ids(), WORK.new_tokens)
    for _ in range(WORK.new_tokens):
        assert int(stepper.tokens[0, 0]) == int(ours._tokens[0, 0])
        stepper.step(), ours.step()

    monkeypatch.setattr(provider, "elsewhere", functools.partial(elsewhere_of, provider.elsewhere))
    with pytest.raises(Exception, match=r"^GroupQueryAttention runs on CPU\w+; MatMulNBits runs on CPU\w+$"):
        provider.require_placed(tmp_path / "stock-2-2-8", "cpu")
    with pytest.raises(Exception, match="opened only on the CPU"):
        gpu.on_provider(source, "2-2-8", type("Options", (), {"device": "cpu", "model": "bart"}))
    monkeypatch.setitem(provider.PROVIDERS, "cpu", "NoSuchExecutionProvider")
    with pytest.raises(Exception, match="this onnxruntime has no NoSuchExecutionProvider"):
        gpu.on_provider(source, "2-2-8", options)


def elsewhere_of(real: Any, events: Any, provider: str) -> list[str]:
    """What a CUDA session would find of events of the CPU."""
    assert real(events, provider) == []
    found: list[str] = real(events, "CUDAExecutionProvider")
    return found


def test_cut_models_have_a_goal_on_a_gpu(benchmarks: Any) -> None:
    times = {"whole eager": 3.0, "6of12 eager": 2.0, "8of12 eager": 2.5, "whole compiled": 1.5, "6of12 compiled": 1.0}
    labels = {f"{name}, batch {batch}": time for name, time in times.items() for batch in (1, 8)}
    steps = [labels, {**labels, "6of12 compiled, batch 8": 0.9}, {**labels, "6of12 compiled, batch 8": 0.9}]
    found = benchmarks("gpu").cut_than_whole(steps, [1, 8, 32])
    assert {label: (figure["value"], figure["within"]) for label, figure in found.items()} == {
        "6of12 eager, batch 1": (1.5, False),
        "6of12 eager, batch 8": (1.5, False),
        "6of12 compiled, batch 1": (1.5, False),
        "6of12 compiled, batch 8": (pytest.approx(1.5 / 0.9), True),
    }
    assert {figure["bound"] for figure in found.values()} == {1.51}


@pytest.mark.slow
@pytest.mark.parametrize("model", ["gpt2", "bart"])
def test_a_profile_shares_out_the_time_of_steps(model: str, benchmarks: Any, tmp_path: Path) -> None:
    own_models, profile = benchmarks("own_models"), benchmarks("step_profile")
    source = own_models.stock(own_models.Shape(model=model, **SIZES), tmp_path)
    (tmp_path / "2-2-8").mkdir()
    own_models.export_own(source, "2-2-8", tmp_path / "2-2-8")
    events = profile.profiled(tmp_path / "2-2-8", past=6, new_tokens=3, threads=1)
    found = profile.shares(events, steps=3)
    operators = found["operators"]
    assert sum(each["share"] for each in operators.values()) == pytest.approx(1)
    assert "If" not in operators
    # a layer's products, and the head; BART's projection of the encoder's states has no rows after the first step
    _, kernels = profile.steps_of(events, 3)
    products = [each["args"]["input_type_shape"][0] for each in kernels if each["args"]["op_name"] == "MatMulNBits"]
    assert operators["MatMulNBits"]["nodes"] == len(products) / 3 == (5 if model == "gpt2" else 8)
    assert products.count({"float": [1, 1, 48]}) == 3 * (4 if model == "gpt2" else 6)
    assert products.count({"float": [1, 0, 48]}) == 3 * (0 if model == "gpt2" else 1)
    assert operators["GroupQueryAttention"]["nodes"] == 1
    assert found["nodes_us"] == pytest.approx(sum(each["us"] for each in operators.values()))
    assert 0 < found["nodes_us"] < found["run_us"]
    assert len(found["largest_nodes"]) == profile.LARGEST
    assert not list(Path.cwd().glob("*profile*.json"))
    with pytest.raises(Exception, match="--past 30 and --new-tokens 33 exceed the 32 positions"):
        profile.profiled(tmp_path / "2-2-8", past=30, new_tokens=33, threads=1)
    with pytest.raises(Exception, match=r"has neither model.onnx nor decoder_model_merged.onnx"):
        profile.profiled(source, past=6, new_tokens=3, threads=1)
