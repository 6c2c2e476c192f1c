from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

import compress
from compress.cli.app import _exit_code, console, show
from compress.cli.tables import records_table
from compress.registry import MEASUREMENTS, STAGES, TERMS

ROOT = Path(__file__).parent.parent
NAMES = ["recipe", *STAGES.names(), *TERMS.names(), *MEASUREMENTS.names()]
RECIPE = """
version: 1
name: tiny
model: {config: {model_type: gpt2, n_layer: 1, n_embd: 16, n_head: 2, n_positions: 32}, tokenizer: {train_bpe: 262}}
data: {train: {text: lines.txt}, eval: {text: lines.txt}, block: 8}
stages:
  - {type: finetune, name: tuned, train: {steps: 1, batch: 2, precision: fp32}}
  - {type: export_onnx, name: onnx}
measure:
  - size
  - quality
"""


class Told:
    """What a command printed and how it ended."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


Command = Callable[..., Told]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    def run(*arguments: object) -> Told:
        monkeypatch.setattr(sys, "argv", ["compress-lm", *map(str, arguments)])
        capsys.readouterr()
        code = _exit_code()
        printed = capsys.readouterr()
        return Told(code, printed.out, printed.err)

    return run


def write_recipe(directory: Path) -> Path:
    (directory / "lines.txt").write_text("the cat sat on the mat\nthe dog ran to the park\n" * 8)
    path = directory / "tiny.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a recipe and the ``work`` of a run of it."""
    from compress.pipeline import run

    directory = tmp_path_factory.mktemp("cli")
    run(write_recipe(directory), directory / "work", device="cpu")
    return directory


def refused(told: Told, text: str) -> None:
    """Exit code 2, and one line on standard error."""
    assert told.code == 2
    assert told.out == ""
    assert told.err.count("\n") == 1
    assert told.err.startswith("error: ")
    assert text in told.err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["chek"], "No such command 'chek'. Did you mean 'check'?"),
        (["check"], "Missing argument 'RECIPE'."),
        (["check", "none.yaml"], "none.yaml: no such recipe"),
        (["run", "none.yaml", "--device", "tpu"], "--device"),
        (["run", "none.yaml", "--sett", "x=1"], "--sett"),
        (["report", "nowhere"], "nowhere: no run.json here"),
        (["bench", "./nowhere"], "nowhere"),
        (["generate", "nowhere", "--prompt", "x"], "nowhere: no such model directory"),
        (["generate", "nowhere"], "--prompt"),
        (["generate", "nowhere", "--prompt", "x", "--temperature", "inf"], "--temperature"),
        (["generate", "nowhere", "--prompt", "x", "--seed", "-1"], "--seed"),
        (["check", "a-file/inside"], "a-file/inside: Not a directory"),
        (["run", "tiny.yaml", "--workdir", "a-file/inside"], "a-file/inside: Not a directory"),
        (["run", "tiny.yaml", "--workdir", "w" * 300], "File name too long"),
        (["run", "tiny.yaml", "--set", "model.config.n_head=3"], "tiny.yaml:4: models.base.config: no gpt2 can be"),
        (["describe", "prun"], "nothing is called 'prun'. Did you mean 'prune'?"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    cli: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_recipe(tmp_path)
    Path("a-file").touch()
    refused(cli(*arguments), text)


def test_the_process_ends_the_same_way() -> None:
    bad = Path("tests/bad_recipes/unknown_stage.yaml")
    done = subprocess.run(
        [sys.executable, "-m", "compress", "check", str(bad)],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: {bad}:7: stages.0: unknown stage 'prun'. Did you mean 'prune'? Known: ")
    assert done.stderr.count("\n") == 1


def test_without_arguments_it_shows_help(cli: Command) -> None:
    told = cli()
    assert told.code == 0
    for command in ("check", "run", "report", "bench", "generate", "list", "describe"):
        assert command in told.out


def test_the_version_is_told(cli: Command) -> None:
    told = cli("--version")
    assert told.code == 0
    assert told.out == f"compress-lm {compress.__version__}\n"


def test_rows_that_were_cut_are_told(cli: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "were cut" not in cli("check", write_recipe(tmp_path)).out
    (tmp_path / "rows.jsonl").write_text('{"q": "the", "a": "cat"}\n{"q": "the", "a": "cat sat on the mat"}\n')
    setting = "data.eval={json: rows.jsonl, prompt: q, response: a}"
    told = cli("check", "tiny.yaml", "--set", setting, "--set", "data.max_target=4")
    assert "data.eval: 1 of 2 rows were cut to fit" in told.out


def test_a_wide_table_in_a_file_is_whole(capsys: pytest.CaptureFixture[str]) -> None:
    quality = {f"metric number {at}": 1.0 for at in range(20)}
    show(console(), records_table([{"name": "x" * 30, "quality": quality}]))
    titles = capsys.readouterr().out.splitlines()[0]
    assert all(name in titles for name in quality)


def test_check_shows_the_plan_and_writes_nothing(cli: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    told = cli("check", write_recipe(tmp_path))
    assert told.code == 0
    assert "will be built" in told.out
    assert "will run" in told.out
    assert told.out.rstrip().endswith("is sound")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lines.txt", "tiny.yaml"]


def test_check_says_what_is_reused(cli: Command, finished: Path) -> None:
    told = cli("check", finished / "tiny.yaml", "--workdir", finished / "work")
    assert told.out.count("reused") == 3
    changed = cli("check", finished / "tiny.yaml", "--workdir", finished / "work", "--set", "stages.tuned.train.lr=0.1")
    assert changed.out.count("reused") == 1
    assert changed.out.count("will run") == 2


def test_run_reuses_measures_and_reports(cli: Command, finished: Path) -> None:
    told = cli("run", finished / "tiny.yaml", "--workdir", finished / "work", "--device", "cpu")
    assert told.code == 0
    assert told.out.count("reused") == 4
    assert "perplexity" in told.out
    assert "report.html" in told.out
    report = json.loads((finished / "work" / "report.json").read_text())
    assert [record["name"] for record in report["artifacts"]] == ["base", "tuned", "onnx"]
    assert all(record["bytes"] > 0 and record["quality"]["perplexity"] > 1 for record in report["artifacts"])
    assert report["environment"]


def test_report_of_several_runs_goes_where_it_is_told(cli: Command, finished: Path, tmp_path: Path) -> None:
    assert cli("report", finished / "work", finished / "work", "--out", tmp_path).code == 0
    assert {"report.html", "report.json", "report.md"} <= {path.name for path in tmp_path.iterdir()}


def artifact(finished: Path, name: str) -> Path:
    return next((finished / "work").glob(f"*-{name}-*"))


@pytest.mark.parametrize("name", ["tuned", "onnx"])
def test_generate_continues_a_prompt(cli: Command, finished: Path, name: str) -> None:
    def told(*options: object) -> str:
        done = cli("generate", artifact(finished, name), "--prompt", "the cat", "--max-new-tokens", 6, *options)
        assert done.code == 0
        return done.out

    assert told() == told()
    sampled = ("--temperature", 1.5)
    assert told(*sampled, "--seed", 1) == told(*sampled, "--seed", 1)
    assert len({told(*sampled, "--seed", seed) for seed in range(4)}) > 1


def test_torch_and_onnx_generate_the_same_text(cli: Command, finished: Path) -> None:
    first, second = (
        cli("generate", artifact(finished, name), "--prompt", "the dog sat", "--max-new-tokens", 8).out
        for name in ("tuned", "onnx")
    )
    assert first == second


@pytest.mark.parametrize("name", ["tuned", "onnx"])
def test_generate_refuses_what_does_not_fit(cli: Command, finished: Path, name: str) -> None:
    refused(cli("generate", artifact(finished, name), "--prompt", "the cat " * 20), "64 new ones")
    refused(cli("generate", artifact(finished, name), "--prompt", ""), "--prompt is empty")


def test_bench_times_directories_side_by_side(cli: Command, finished: Path) -> None:
    pair = artifact(finished, "tuned"), artifact(finished, "onnx")
    told = cli("bench", *pair, "--prompt", 4, "--new-tokens", 2, "--threads", 1, "--device", "cpu")
    assert told.code == 0
    assert "tokens/s" in told.out
    for path in pair:
        assert path.name in told.out
    refused(cli("bench", pair[0], pair[0]), "give each directory once")


def test_list_names_everything_with_a_sentence(cli: Command) -> None:
    told = cli("list")
    for name in NAMES[1:]:
        assert name in told.out
    assert "``" not in told.out


@pytest.mark.parametrize("name", NAMES)
def test_describe_tells_fields_and_schema(cli: Command, name: str) -> None:
    told = cli("describe", name)
    assert told.code == 0
    assert "field" in told.out and "default" in told.out
    schema: dict[str, Any] = json.loads(cli("describe", name, "--json-schema").out)
    for field in schema["properties"]:
        assert field in told.out


def test_the_schema_takes_what_a_recipe_may_say(cli: Command) -> None:
    schema = json.loads(cli("describe", "recipe", "--json-schema").out)

    def kinds(field: Any) -> dict[str, Any]:
        """What an item of a list may be, by its type."""
        names, mapping = field["items"]["anyOf"]
        assert mapping["required"] == ["type"]
        inside = [schema["$defs"][each["$ref"].split("/")[-1]] if "$ref" in each else each for each in mapping["anyOf"]]
        found = {each["properties"]["type"]["const"]: each["properties"] for each in inside}
        assert list(found) == names["enum"]
        return found

    assert set(kinds(schema["properties"]["measure"])) == set(MEASUREMENTS.names())
    stages = kinds(schema["properties"]["stages"])
    assert set(stages) == set(STAGES.names())
    for stage in ("quantize", "distill", "learn_masks"):
        terms = kinds(stages[stage]["terms"])
        assert set(terms) == set(TERMS.names())
        assert set(terms["jensen_shannon"]) == {"type", "weight", "beta"}


def test_describe_goes_into_what_a_field_holds(cli: Command) -> None:
    told = cli("describe", "distill")
    assert "(required)" in told.out
    assert "TrainConfig" in told.out
    assert "number >= 0 < 1" in told.out
    assert "linear | cosine | constant" in told.out


def raising(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("compress.pipeline.running.measure", fail)


def test_ctrl_c_says_that_it_continues(cli: Command, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raising(monkeypatch, KeyboardInterrupt())
    told = cli("run", finished / "tiny.yaml", "--workdir", finished / "work")
    assert told.code == 130
    assert told.err.strip() == "stopped; the same command continues where it was"


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_one_line(
    cli: Command, finished: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    raising(monkeypatch, error)
    told = cli("run", finished / "tiny.yaml", "--workdir", finished / "work")
    assert told.code == 1
    assert told.err == "error: no space left on the disk; what is finished stays, and the same command continues\n"


def test_other_errors_of_the_system_are_not_hidden(
    cli: Command, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raising(monkeypatch, OSError(errno.EIO, "input/output error"))
    with pytest.raises(OSError, match="input/output"):
        cli("run", finished / "tiny.yaml", "--workdir", finished / "work")
