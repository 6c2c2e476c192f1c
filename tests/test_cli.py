from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors import SafetensorError

import compress
from compress.artifact import adopt
from compress.cli.app import _exit_code, console, show_records
from compress.cli.bench import bench_models, labels
from compress.errors import UserError
from compress.registry import MEASUREMENTS, METRICS, STAGES, TERMS
from compress.training.objective import Objective

ROOT = Path(__file__).parent.parent
NAMES = ["recipe", *STAGES.names(), *TERMS.names(), *MEASUREMENTS.names()]
MODEL = "{config: {model_type: gpt2, n_layer: 1, n_embd: 16, n_head: 2, n_positions: 32}, tokenizer: {train_bpe: 262}}"
RECIPE = f"""
version: 1
name: tiny
model: {MODEL}
data: {{train: {{text: lines.txt}}, eval: {{text: lines.txt}}, block: 8}}
stages:
  - {{type: finetune, name: tuned, train: {{steps: 1, batch: 2, precision: fp32}}}}
  - {{type: export_onnx, name: onnx}}
measure:
  - size
  - quality
"""


class Outcome:
    """What a command printed and how it ended."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


Command = Callable[..., Outcome]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["compress-lm", *map(str, arguments)])
        capsys.readouterr()
        code = _exit_code()
        printed = capsys.readouterr()
        return Outcome(code, printed.out, printed.err)

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


def refused(outcome: Outcome, text: str) -> None:
    """Exit code 2, and one line on standard error."""
    assert outcome.code == 2
    assert outcome.out == ""
    assert outcome.err.count("\n") == 1
    assert outcome.err.startswith("error: ")
    assert text in outcome.err


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
        (["check", "a-loop"], "a-loop: Too many levels of symbolic links"),
        (["check", "."], ".: is a directory, not a recipe file"),
        (["check", "tiny.yaml", "--workdir", "a-file"], "--workdir a-file: is a file, not a directory"),
        (["run", "tiny.yaml", "--workdir", "/proc/nothing"], "--workdir /proc/nothing: No such file or directory"),
        (["run", "tiny.yaml", "--set", "data.eval={text: a-file}"], "--set: data.eval: a-file is empty"),
        (["run", "tiny.yaml", "--set", "data.block=33"], "data.block: 33, but the model accepts at most 32 tokens"),
        (["run", "tiny.yaml", "--set", "stages=[prun]"], "stages[0]: unknown stage 'prun'. Did you mean 'prune'?"),
        (
            ["run", "tiny.yaml", "--set", "stages=[export_onnx, {type: finetune, train: {steps: 1}}]"],
            "stages[1]: finetune cannot work on a model that is onnx",
        ),
        (
            ["run", str(ROOT / "tests/bad_recipes/other_vocabulary.yaml")],
            "teacher: 'big' has a vocabulary of 96 tokens, but the student 'base' has 64; "
            "they must use the same vocabulary",
        ),
        (["run", "tiny.yaml", "--workdir", "a-file/inside"], "a-file/inside: Not a directory"),
        (["run", "tiny.yaml", "--workdir", "w" * 300], "File name too long"),
        (
            ["run", "tiny.yaml", "--set", "model.config.n_head=3"],
            "tiny.yaml:4: models.base.config: cannot build a gpt2 model",
        ),
        (["describe", "prun"], "unknown name 'prun'. Did you mean 'prune'?"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    cli: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_recipe(tmp_path)
    Path("a-file").touch()
    Path("a-loop").symlink_to("a-loop")
    refused(cli(*arguments), text)


@pytest.mark.slow
def test_the_process_ends_the_same_way() -> None:
    bad = Path("tests/bad_recipes/unknown_stage.yaml")
    done = subprocess.run(
        [sys.executable, "-m", "compress", "check", str(bad)],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: {bad}:7: stages[0]: unknown stage 'prun'. Did you mean 'prune'? Known: ")
    assert done.stderr.count("\n") == 1


def test_without_arguments_it_shows_help(cli: Command) -> None:
    outcome = cli()
    assert outcome.code == 0
    for command in ("check", "run", "report", "bench", "generate", "list", "describe"):
        assert command in outcome.out


def test_the_version_is_reported(cli: Command) -> None:
    outcome = cli("--version")
    assert outcome.code == 0
    assert outcome.out == f"compress-lm {compress.__version__}\n"


@pytest.mark.slow
def test_rows_that_were_cut_are_reported(cli: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "were cut" not in cli("check", write_recipe(tmp_path)).out
    (tmp_path / "rows.jsonl").write_text('{"q": "the", "a": "cat"}\n{"q": "the", "a": "cat sat on the mat"}\n')
    setting = "data.eval={json: rows.jsonl, prompt: q, response: a}"
    outcome = cli("check", "tiny.yaml", "--set", setting, "--set", "data.max_target=4")
    assert "data.eval: 1 of 2 rows were cut to fit" in outcome.out


def test_a_wide_table_in_a_file_is_whole(capsys: pytest.CaptureFixture[str]) -> None:
    quality = {f"metric number {at}": 1.0 for at in range(20)}
    show_records(console(), [{"name": "x" * 30, "quality": quality}])
    titles = capsys.readouterr().out.splitlines()[0]
    assert all(name in titles for name in quality)


@pytest.mark.parametrize("width", [40, 60, 80, 140, 400])
def test_a_narrow_terminal_shows_whole_columns(width: int) -> None:
    screen = Console(width=width, force_terminal=True, color_system=None, file=io.StringIO())
    quality = {f"metric {at}": 1000.0 + at for at in range(20)}
    show_records(screen, [{"name": "a-rather-long-name", "quality": quality}])
    titles, _, _, values, *more = screen.file.getvalue().splitlines()
    shown = [name for name in quality if name in titles]
    assert shown == list(quality)[: len(shown)] and len(shown) >= 1
    assert values.split() == ["a-rather-long-name", *(f"1,{at:03}" for at in range(len(shown)))]
    assert "".join(more).strip().startswith("" if width == 400 else f"{20 - len(shown)} more columns in a window of ")
    assert width != 80 or len(titles) <= 80


@pytest.mark.slow
def test_check_shows_the_plan_and_writes_nothing(cli: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = cli("check", write_recipe(tmp_path))
    assert outcome.code == 0
    assert "will be built" in outcome.out
    assert "will run" in outcome.out
    assert outcome.out.rstrip().endswith("is valid")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lines.txt", "tiny.yaml"]


@pytest.mark.slow
def test_check_says_what_is_reused(cli: Command, finished: Path) -> None:
    outcome = cli("check", finished / "tiny.yaml", "--workdir", finished / "work")
    assert outcome.out.count("reused") == 3
    changed = cli("check", finished / "tiny.yaml", "--workdir", finished / "work", "--set", "stages.tuned.train.lr=0.1")
    assert changed.out.count("reused") == 1
    assert changed.out.count("will run") == 2


@pytest.mark.slow
def test_run_reuses_measures_and_reports(cli: Command, finished: Path) -> None:
    outcome = cli("run", finished / "tiny.yaml", "--workdir", finished / "work", "--device", "cpu")
    assert outcome.code == 0
    assert outcome.out.count("reused") == 4
    assert "perplexity" in outcome.out
    assert "report.html" in outcome.out
    report = json.loads((finished / "work" / "report.json").read_text())
    assert [record["name"] for record in report["artifacts"]] == ["base", "tuned", "onnx"]
    assert all(record["bytes"] > 0 and record["quality"]["perplexity"] > 1 for record in report["artifacts"])
    assert report["environment"]


@pytest.mark.slow
def test_a_run_ends_with_the_exports_that_are_no_faster(
    cli: Command, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = "onnx is quantized but no faster per token than base [in torch] (0.90x): " + "why " * 40
    monkeypatch.setattr("compress.report.slow_exports", lambda workdir: [line] * (workdir == finished / "work"))
    outcome = cli("run", finished / "tiny.yaml", "--workdir", finished / "work", "--device", "cpu")
    assert outcome.out.index("perplexity") < outcome.out.index(line) < outcome.out.index("report: ")


def test_report_of_several_runs_goes_where_it_is_reported(cli: Command, finished: Path, tmp_path: Path) -> None:
    assert cli("report", finished / "work", finished / "work", "--out", tmp_path).code == 0
    assert {"report.html", "report.json", "report.md"} <= {path.name for path in tmp_path.iterdir()}


def artifact(finished: Path, name: str) -> Path:
    return next((finished / "work").glob(f"*-{name}-*[0-9a-f]"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tuned", "onnx"])
def test_generate_continues_a_prompt(cli: Command, finished: Path, name: str) -> None:
    def outcome(*options: object) -> str:
        done = cli("generate", artifact(finished, name), "--prompt", "the cat", "--max-new-tokens", 6, *options)
        assert done.code == 0
        return done.out

    assert outcome() == outcome()
    sampled = ("--temperature", 1.5)
    assert outcome(*sampled, "--seed", 1) == outcome(*sampled, "--seed", 1)
    assert len({outcome(*sampled, "--seed", seed) for seed in range(4)}) > 1


@pytest.mark.parametrize("options", [(), ("--num-beams", 4)])
def test_torch_and_onnx_generate_the_same_text(cli: Command, finished: Path, options: tuple[Any, ...]) -> None:
    first, second = (
        cli("generate", artifact(finished, name), "--prompt", "the dog sat", "--max-new-tokens", 8, *options)
        for name in ("tuned", "onnx")
    )
    assert first.code == second.code == 0
    assert first.out == second.out


@pytest.mark.parametrize("options", [(), ("--num-beams", 4)])
def test_what_ends_a_text_is_the_same_in_both_runtimes(
    cli: Command, finished: Path, tmp_path: Path, options: tuple[Any, ...]
) -> None:
    """The tokenizer alone calls a word of the text its end; nothing of it is shown."""
    arguments = ("--prompt", "the dog sat", "--max-new-tokens", 8, *options)
    free = cli("generate", artifact(finished, "onnx"), *arguments).out
    tokenizer = adopt(artifact(finished, "tuned")).tokenizer()
    word = tokenizer.convert_ids_to_tokens(tokenizer(free.rstrip("\n"))["input_ids"])[-1]
    said = []
    for name in ("tuned", "onnx"):
        shutil.copytree(artifact(finished, name), tmp_path / name, ignore=shutil.ignore_patterns("artifact.json"))
        settings = json.loads((tmp_path / name / "tokenizer_config.json").read_text())
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": word}))
        said.append(cli("generate", tmp_path / name, *arguments).out)
    assert said[0] == said[1] != free


@pytest.mark.parametrize("damage", ["changed", "missing", "no manifest"])
def test_generate_refuses_graphs_that_are_not_the_sealed_ones(
    cli: Command, finished: Path, tmp_path: Path, damage: str
) -> None:
    model = tmp_path / "m"
    shutil.copytree(artifact(finished, "onnx"), model)
    expected = {
        "changed": "model.onnx has changed since the artifact was saved",
        "no manifest": "is not the manifest of an artifact",
    }
    if damage == "changed":
        content = bytearray((model / "model.onnx").read_bytes())
        content[len(content) // 2] ^= 1
        (model / "model.onnx").write_bytes(content)
    elif damage == "missing":
        (model / "model.onnx").rename(model / "other.onnx")
    else:
        (model / "artifact.json").write_text('{"files": 3}')
    refused(cli("generate", model, "--prompt", "the"), expected.get(damage, "model.onnx is missing"))


@pytest.mark.parametrize("name", ["tuned", "onnx"])
def test_generate_refuses_a_tokenizer_that_is_none(cli: Command, finished: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(artifact(finished, name), tmp_path / name, ignore=shutil.ignore_patterns("artifact.json"))
    (tmp_path / name / "tokenizer.json").write_text("{}")
    refused(cli("generate", tmp_path / name, "--prompt", "the cat"), f"{tmp_path / name}: cannot read the tokenizer")


@pytest.mark.parametrize("name", ["tuned", "onnx"])
def test_generate_refuses_what_does_not_fit(cli: Command, finished: Path, name: str) -> None:
    refused(cli("generate", artifact(finished, name), "--prompt", "the cat " * 20), "64 new tokens")
    refused(cli("generate", artifact(finished, name), "--prompt", ""), "--prompt is empty")
    refused(cli("generate", artifact(finished, name), "--prompt", "\udcff"), "--prompt is not valid UTF-8")
    cold = ("--temperature", "1e-320")
    refused(cli("generate", artifact(finished, name), "--prompt", "the", *cold), "--temperature is 9.99989e-321; give")
    both = ("--num-beams", 4, "--temperature", 0.5)
    refused(
        cli("generate", artifact(finished, name), "--prompt", "the cat", *both),
        "--num-beams 4 uses beam search and --temp",
    )


@pytest.mark.slow
def test_bench_times_directories_side_by_side(cli: Command, finished: Path) -> None:
    pair = artifact(finished, "tuned"), artifact(finished, "onnx")
    outcome = cli("bench", *pair, "--prompt-tokens", 4, "--new-tokens", 2, "--threads", 1, "--device", "cpu")
    assert outcome.code == 0
    titles, units, _, *lines = (re.split(r"\s{2,}", line.strip()) for line in outcome.out.splitlines())
    assert list(zip(titles, ["", *units], strict=True)) == [
        ("name", ""), ("per token", "ms, p50 / p95"), ("faster", "per token"), ("prefill", "ms, p50 / p95"),
        ("faster", "prefill"), ("throughput", "tokens/s"), ("weights", "MB per token"), ("floor", "ms per token"),
        ("above floor", "per token"),
    ]  # fmt: skip
    assert [line[0] for line in lines] == [path.name for path in pair]
    for at in (2, 4):
        assert lines[0][at] == "1.00x" != lines[1][at]
    refused(cli("bench", pair[0], pair[0]), f"{pair[0]} is given twice; give each directory once")


@pytest.mark.slow
def test_bench_takes_any_directories(cli: Command, finished: Path, tmp_path: Path) -> None:
    """Two of one name, one of which has lost its manifest; and how often they decode is outcome."""
    deployed, sealed = tmp_path / "a" / "m", tmp_path / "b" / "m"
    shutil.copytree(artifact(finished, "onnx"), deployed, ignore=shutil.ignore_patterns("artifact.json"))
    shutil.copytree(artifact(finished, "onnx"), sealed)
    settings = {"prompt_tokens": 4, "new_tokens": 2, "threads": 1, "rounds": 2}
    records = bench_models([deployed, sealed], settings, "cpu", console())
    assert [record["name"] for record in records] == ["a/m", "b/m"]
    first, second = (record["conditions"]["speed"] for record in records)
    assert first == second and first["runtime"] == "onnxruntime" and first["rounds"] == 2
    assert records[0]["speed"]["weight_bytes_per_token"] == records[1]["speed"]["weight_bytes_per_token"]
    outcome = cli("bench", deployed, "--prompt-tokens", 4, "--new-tokens", 2, "--threads", 1, "--rounds", 0)
    refused(outcome, "--rounds")
    (deployed / "config.json").unlink()
    refused(cli("bench", deployed), "config.json")


def test_directories_are_reported_apart_by_what_differs() -> None:
    paths = [Path(path) for path in ("/x/a/m", "/y/a/m", "/y/b/n", "/m")]
    assert labels(paths) == ["x/a/m", "y/a/m", "n", "/m"]
    with pytest.raises(UserError, match="/y/a/../b is given twice; give each directory once"):
        labels([Path("/y/b"), Path("/z"), Path("/y/a/../b")][::-1])


def test_list_names_everything_with_a_sentence(cli: Command) -> None:
    outcome = cli("list")
    for name in [*NAMES[1:], *METRICS.names()]:
        assert name in outcome.out
    assert "``" not in outcome.out


@pytest.mark.parametrize("name", METRICS.names())
def test_a_metric_is_described_by_its_figures(cli: Command, name: str) -> None:
    outcome = cli("describe", name)
    lines = {line.split()[0]: line for line in outcome.out.splitlines() if line.strip()}
    for key, figure in METRICS.get(name).figures.items():
        direction = "(a condition)" if figure.condition else figure.better or "(no direction)"
        assert figure.label in lines[key] and lines[key].rstrip().endswith(direction)
    refused(cli("describe", name, "--json-schema"), f"{name} is a metric and has no fields")


def test_a_name_that_is_nothing_is_held_against_metrics_too(cli: Command) -> None:
    refused(cli("describe", "rogue"), "Did you mean 'rouge'?")


@pytest.mark.parametrize("name", NAMES)
def test_describe_tells_fields_and_schema(cli: Command, name: str) -> None:
    outcome = cli("describe", name)
    assert outcome.code == 0
    assert "field" in outcome.out and "default" in outcome.out
    schema: dict[str, Any] = json.loads(cli("describe", name, "--json-schema").out)
    for field in schema["properties"]:
        assert field in outcome.out


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
    outcome = cli("describe", "distill")
    assert "(required)" in outcome.out
    assert "TrainConfig" in outcome.out
    assert "number >= 0 < 1" in outcome.out
    assert "linear | cosine | constant" in outcome.out


def raising(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("compress.pipeline.running.measure", fail)


def test_ctrl_c_says_that_it_continues(cli: Command, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raising(monkeypatch, KeyboardInterrupt())
    outcome = cli("run", finished / "tiny.yaml", "--workdir", finished / "work")
    assert outcome.code == 130
    assert outcome.err.strip() == "stopped; run the same command again to continue"


@pytest.mark.slow
@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        Exception("No space left on device (os error 28)"),  # as the tokenizers library has it
    ],
)
def test_a_full_disk_is_one_line(
    cli: Command, finished: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    raising(monkeypatch, error)
    outcome = cli("run", finished / "tiny.yaml", "--workdir", finished / "work")
    assert outcome.code == 1
    assert (
        outcome.err == "error: no space left on the disk; finished results are kept, and the same command continues\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "text"),
    [
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES), "work/x"), "error: work/x: Permission denied\n"),
        (SafetensorError("I/O error: Permission denied (os error 13)"), "error: I/O error: Permission denied"),
    ],
)
def test_a_place_that_cannot_be_written_is_one_line(
    cli: Command, finished: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, text: str
) -> None:
    raising(monkeypatch, error)
    outcome = cli("run", finished / "tiny.yaml", "--workdir", finished / "work")
    assert outcome.code == 2
    assert outcome.err.startswith(text) and outcome.err.count("\n") == 1


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: 9 bytes"),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    ],
)
def test_too_little_memory_is_one_line(
    cli: Command, finished: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    raising(monkeypatch, error)
    outcome = cli("run", finished / "tiny.yaml", "--workdir", finished / "work")
    assert outcome.code == 1
    assert outcome.err == (
        "error: out of memory; finished results are kept, "
        "and a smaller batch (with more accumulate) needs less memory\n"
    )


@pytest.mark.parametrize("error", [OSError(errno.EIO, "input/output error"), RuntimeError("a mistake of ours")])
def test_other_errors_are_not_hidden(
    cli: Command, finished: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    raising(monkeypatch, error)
    with pytest.raises(type(error), match=str(error.args[-1])):
        cli("run", finished / "tiny.yaml", "--workdir", finished / "work")


def states(outcome: Outcome) -> dict[str, str]:
    """The last column of a plan, by name."""
    lines = [re.split(r"\s{2,}", line.strip()) for line in outcome.out.splitlines()]
    return {line[0]: line[-1] for line in lines if line[0] in ("base", "tuned", "onnx")}


def stopped_while_sealing(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the file system fail, or a user lose patience, once an export is on its way to the disk."""
    fsync = os.fsync

    def fail(handle: int) -> None:
        if "-onnx-" in os.readlink(f"/proc/self/fd/{handle}"):
            raise error
        fsync(handle)

    monkeypatch.setattr(os, "fsync", fail)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), 1, "error: no space left on the disk"),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), 1, "error: no space left on the disk"),
        (OSError(errno.EROFS, os.strerror(errno.EROFS)), 2, "error: Read-only file system"),
        (KeyboardInterrupt(), 130, "stopped; run the same command again to continue"),
    ],
    ids=["full", "quota", "read-only", "ctrl-c"],
)
def test_what_stops_a_seal_leaves_what_is_finished(
    cli: Command, finished: Path, tmp_path: Path, error: BaseException, code: int, text: str
) -> None:
    work = tmp_path / "work"
    shutil.copytree(finished / "work", work, ignore=shutil.ignore_patterns("*-onnx-*", "measured", "*report*"))
    command = ("run", finished / "tiny.yaml", "--workdir", work, "--device", "cpu")
    with pytest.MonkeyPatch.context() as patch:
        stopped_while_sealing(error, patch)
        outcome = cli(*command)
    assert outcome.code == code
    assert outcome.err.splitlines()[-1].startswith(text)  # after the progress bars of a library
    assert "Traceback" not in outcome.err
    assert not list(work.glob("*-onnx-*[0-9a-f]"))
    check = cli("check", finished / "tiny.yaml", "--workdir", work)
    assert states(check) == {"base": "reused", "tuned": "reused", "onnx": "continues"}
    assert cli(*command).code == 0
    assert adopt(artifact(tmp_path, "onnx")).digest == adopt(artifact(finished, "onnx")).digest


@pytest.mark.slow
def test_ctrl_c_in_the_middle_of_training_continues(
    cli: Command, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("run", finished / "tiny.yaml", "--device", "cpu", "--set", "stages.tuned.train.steps=4")
    assert cli(*command, "--workdir", tmp_path / "straight" / "work").code == 0
    calls, forward = [], Objective.forward

    def interrupted(self: Objective, batch: Any) -> Any:
        calls.append(batch)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return forward(self, batch)

    monkeypatch.setattr(Objective, "forward", interrupted)
    outcome = cli(*command, "--workdir", tmp_path / "work")
    assert outcome.code == 130
    assert outcome.err.splitlines()[-1] == "stopped; run the same command again to continue"
    assert "Traceback" not in outcome.err
    assert adopt(artifact(tmp_path, "base")).digest == adopt(artifact(finished, "base")).digest
    (partial,) = (tmp_path / "work").glob("*-tuned-*.partial")
    assert [path.name for path in (partial / "checkpoints").glob("step-*")] == ["step-00000002"]
    assert cli(*command, "--workdir", tmp_path / "work").code == 0
    assert len(calls) == 4
    assert adopt(artifact(tmp_path, "tuned")).digest == adopt(artifact(tmp_path / "straight", "tuned")).digest
