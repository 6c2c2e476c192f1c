"""The comparisons of ``benchmarks/``: what they print, and that a figure beyond its bound fails them."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
TINY = {
    "adaptive_kl": ("--tokens=4", "--vocabulary=50"),
    "training_step": ("--layers=1", "--hidden=64", "--vocabulary=32", "--length=8", "--batch=1"),
}
CONDITIONS = {"adaptive_kl": "spread", "training_step": "device"}
FIGURES = {
    "adaptive_kl": {"ratios": {"adaptive_kl"}, "extra_chunks": {"adaptive_kl"}},
    "training_step": {"ratios": {"masked", "quantized"}},
}


@pytest.fixture
def comparing() -> ModuleType:
    spec = importlib.util.spec_from_file_location("comparing", ROOT / "benchmarks" / "comparing.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def script(name: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "benchmarks" / f"{name}.py", *options],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_make_bench_runs_each_comparison_and_nothing_else() -> None:
    listed = re.search(r"^BENCHMARKS := (.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert listed is not None
    runnable = [file.stem for file in (ROOT / "benchmarks").glob("*.py") if "__main__" in file.read_text()]
    assert listed[1].split() == sorted([*TINY, "deployment", "gpu"])
    assert sorted(runnable) == sorted([*listed[1].split(), "answers", "step_profile"])  # which take a user's models


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(TINY))
def test_the_result_holds_conditions_steps_and_bounded_figures(name: str) -> None:
    done = script(name, "--rounds=2", *TINY[name])
    result = json.loads(done.stdout)
    assert {CONDITIONS[name], "rounds", "precision", "threads"} <= set(result["conditions"])
    assert {kind: set(found) for kind, found in result.items() if kind not in ("conditions", "step_ms")} == FIGURES[
        name
    ]
    assert all(time > 0 for time in result["step_ms"].values())
    for figure in result["ratios"].values():
        assert figure["quartile_1"] <= figure["value"] <= figure["quartile_3"]
    figures = [figure for kind in FIGURES[name] for figure in result[kind].values()]
    assert all(figure["within"] == (figure["value"] <= figure["bound"]) for figure in figures)
    assert done.returncode == (0 if all(figure["within"] for figure in figures) else 1), done.stderr


@pytest.mark.parametrize("rounds", ["1", "many"])
def test_rounds_too_few_for_quartiles_are_refused(comparing: ModuleType, rounds: str) -> None:
    assert comparing.at_least_two("2") == 2
    with pytest.raises(Exception, match=rounds):
        comparing.at_least_two(rounds)


@pytest.mark.parametrize(("text", "taken"), [("3", True), ("2", False), ("0", False), ("-4", False), ("many", False)])
def test_whole_numbers_have_a_least(comparing: ModuleType, text: str, taken: bool) -> None:
    if taken:
        assert comparing.whole(3)(text) == int(text)
    else:
        with pytest.raises(Exception, match=f"'{text}' is not a whole number of at least 3"):
            comparing.whole(3)(text)


def test_places_of_results_are_tried_first(comparing: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for path in (file, tmp_path / "new"):
        assert comparing.writable(str(path)) == path
    for path in (tmp_path / "no" / "x.json", tmp_path, file / "x.json"):
        with pytest.raises(Exception, match=str(path)):
            comparing.writable(str(path))
    for path in (tmp_path, tmp_path / "a" / "b"):
        assert comparing.creatable(str(path)) == path
        assert not (tmp_path / "a").exists()
    for path in (file, file / "models"):
        with pytest.raises(Exception, match=str(path)):
            comparing.creatable(str(path))


def test_a_ratio_is_that_of_two_steps_of_one_round(comparing: ModuleType) -> None:
    rounds = [{"plain": 1.0, "ours": 2.0}, {"plain": 100.0, "ours": 150.0}, {"plain": 1.0, "ours": 1.0}]
    figure = comparing.ratio(rounds, "ours", "plain", 1.5)  # the ratio of the medians would be 2
    assert (figure["value"], figure["within"]) == (1.5, True)


def test_a_speedup_has_a_lower_bound(comparing: ModuleType) -> None:
    rounds = [{"plain": 4.0, "ours": 2.0}, {"plain": 3.0, "ours": 1.0}, {"plain": 2.0, "ours": 2.0}]
    figure = comparing.speedup(rounds, "ours", "plain", 2.0)
    assert (figure["value"], figure["within"]) == (2.0, True)
    assert not comparing.speedup(rounds, "ours", "plain", 2.1)["within"]


def test_percentiles_are_those_of_numpy(comparing: ModuleType) -> None:
    seconds = [0.004, 0.001, 0.002, 0.010, 0.003]
    assert comparing.percentiles(seconds) == pytest.approx({"p50": 3.0, "p95": 1e3 * np.percentile(seconds, 95)})
    assert comparing.percentiles([0.002]) == {"p50": 2.0, "p95": 2.0}


def test_a_result_goes_to_a_file_too(comparing: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert comparing.conclude({"a": 1}, {}, extra={"skipped": {}}, out=tmp_path / "found.json") == 0
    assert capsys.readouterr().out == (tmp_path / "found.json").read_text()
    assert json.loads((tmp_path / "found.json").read_text())["skipped"] == {}


@pytest.mark.parametrize(("value", "code"), [(1.5, 0), (1.51, 1), (float("nan"), 1)])
def test_a_figure_beyond_its_bound_fails_and_is_named(
    comparing: ModuleType, capsys: pytest.CaptureFixture[str], value: float, code: int
) -> None:
    good, tried = comparing.at_most(1.0, 1.0), comparing.at_most(value, 1.5)
    assert comparing.conclude({}, {}, ratios={"good": good, "tried": tried}) == code
    printed = capsys.readouterr()
    assert json.loads(printed.out)["ratios"]["good"]["within"]
    assert printed.err == (f"ratios.tried: {value:.3f} is beyond the bound of 1.5\n" if code else "")
