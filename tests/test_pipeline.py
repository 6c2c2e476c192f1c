from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from rich.console import Console

import compress
from compress.artifact import MANIFEST, Artifact, adopt, save_model
from compress.data import Data
from compress.errors import ModelError, NothingDoneError, RecipeError, UserError
from compress.measure.formats import number
from compress.measure.measurement import Measurement
from compress.measure.quality import Quality
from compress.measure.speed import Speed
from compress.models.families.gpt2 import GPT2
from compress.models.loading import load_stock, load_tokenizer
from compress.models.scratch import train_bpe
from compress.models.structure import stock_tensors
from compress.pipeline import Inputs, Run, make_plan
from compress.pipeline.keys import identity, key, packages, stage_key
from compress.pipeline.records import Plain, difference, join
from compress.pipeline.running import choose_device
from compress.pipeline.workdir import locked
from compress.recipe import read_recipe
from compress.registry import MEASUREMENTS, STAGES
from compress.report import build
from compress.stages.stage import Context, Result, Stage
from compress.surgery.coverage import Coverage
from compress.surgery.quantization import QuantizationSpec

CALLS: list[str] = []


class Shift(Stage):
    """Add a number to every parameter: a stage whose work is quick to do and easy to see."""

    type: Literal["shift"] = "shift"
    by: float = 1.0
    teacher: str | None = None
    stop: Literal["no", "interrupt", "nothing"] = "no"
    trains: ClassVar[bool] = False

    def run(self, source: Artifact, out: Path, context: Context) -> Result:
        CALLS.append(self.name)
        begun = out / "checkpoints" / "begun"
        if self.stop == "interrupt" and not begun.exists():
            begun.parent.mkdir()
            begun.write_text("")
            raise KeyboardInterrupt
        model = source.model()
        for parameter in model.parameters():
            parameter.data += self.by
        coverage = Coverage(
            modules_touched=int(self.stop != "nothing"),
            modules_total=9,
            parameters_touched=9,
            parameters_total=9,
            bytes_before=8,
            bytes_after=8,
        )
        coverage.require(self.name)
        save_model(model, source, out)
        return Result(traits=source.traits, coverage=coverage, metrics={"by": self.by})


class Count(Measurement):
    """Count calls, and the artifacts and tokens it was shown."""

    type: Literal["count"] = "count"
    needs_data: ClassVar[bool] = True
    base: int = 10

    def run(
        self, artifacts: Mapping[str, Artifact], *, data: Data | None, device: str, console: Console | None
    ) -> dict[str, dict[str, Any]]:
        CALLS.append(self.type)
        assert data is not None and data.eval is not None
        return {name: {"quality": {f"base{self.base}": data.eval.tokens}} for name in self.chosen(artifacts)}


RECIPE = """
version: 1
name: tiny
model: {config: {model_type: gpt2, n_layer: 1, n_embd: 8, n_head: 2, n_positions: 16}, tokenizer: {train_bpe: 262}}
data: {train: {text: train.txt}, eval: {text: eval.txt}, block: 8}
stages:
  - {type: shift, name: one}
  - {type: shift, name: two, by: 2}
  - {type: shift, name: three, source: one, by: 3}
measure:
  - count
"""


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(STAGES.builtin, "shift", f"{__name__}:Shift")  # type: ignore[arg-type]
    monkeypatch.setitem(MEASUREMENTS.builtin, "count", f"{__name__}:Count")  # type: ignore[arg-type]
    CALLS.clear()
    yield


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "train.txt").write_text("the cat sat on the mat\nthe dog ran to the park\n" * 8)
    (tmp_path / "eval.txt").write_text("the dog sat on the cat\n" * 4)
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def run(path: Path, *settings: str, workdir: str = "work") -> Run:
    CALLS.clear()
    return compress.run(read_recipe(path, settings), path.parent / workdir)


def states(path: Path, *settings: str) -> dict[str, str]:
    plan = make_plan(Inputs(read_recipe(path, settings), path.parent / "work"))
    return {row.name: row.state for row in plan.rows}


def json_of(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.mark.slow
def test_a_run_leaves_whole_artifacts_and_its_records(recipe: Path) -> None:
    done = run(recipe)
    names = sorted(path.name for path in done.workdir.iterdir() if path.is_dir())
    patterns = ["00-base", "01-one", "02-two", "03-three"]
    assert [re.sub(r"-[0-9a-f]{12}$", "", name) for name in names] == [*patterns, "measured"]
    assert list(done.artifacts) == ["base", "one", "two", "three"]
    for name, artifact in done.artifacts.items():
        assert adopt(artifact.path).digest == artifact.digest, name
        load_stock(artifact.path)
    record = json_of(done.workdir / "run.json")
    assert record["seed"] == 0
    assert [stage["name"] for stage in record["stages"]] == ["one", "two", "three"]
    assert record["models"]["two"] == done.artifacts["two"].path.name
    assert not any(stage["reused"] for stage in record["stages"])
    assert record["environment"]["torch"]
    measured = json_of(done.workdir / "measurements.json")
    assert [entry["name"] for entry in measured["artifacts"]] == ["base", "one", "two", "three"]
    assert all(entry["quality"]["base10"] > 0 for entry in measured["artifacts"])
    assert measured["artifacts"][1]["coverage"]["modules_total"] == 9
    assert measured["conditions"][0]["type"] == "count"


@pytest.mark.slow
def test_stages_start_where_they_say(recipe: Path) -> None:
    done = run(recipe)
    weights = {name: next(artifact.model().parameters()) for name, artifact in done.artifacts.items()}
    for name, shift in (("one", 1), ("two", 3), ("three", 4)):
        assert (weights[name] - weights["base"] - shift).abs().max() < 1e-5
    steps = done.artifacts["two"].manifest.lineage
    assert [step.stage for step in steps] == ["one", "two"]
    assert steps[1].inputs["source"] == done.artifacts["one"].digest
    assert steps[1].metrics == {"by": 2.0}
    assert steps[0].packages == packages()


@pytest.mark.slow
def test_a_second_run_does_nothing(recipe: Path) -> None:
    first = run(recipe)
    stamps = {path: path.stat().st_mtime_ns for path in first.workdir.rglob("*/*")}
    second = run(recipe)
    assert CALLS == []
    assert {path: path.stat().st_mtime_ns for path in first.workdir.rglob("*/*")} == stamps
    assert [stage["reused"] for stage in json_of(second.workdir / "run.json")["stages"]] == [True] * 3
    assert first.records == second.records


@pytest.mark.slow
def test_a_changed_stage_reruns_from_there(recipe: Path) -> None:
    run(recipe)
    assert states(recipe, "stages.two.by=5")["two"] == "runs"
    run(recipe, "stages.two.by=5")
    assert CALLS == ["two", "count"]
    run(recipe, "stages.one.by=7")
    assert CALLS == ["one", "two", "three", "count"]
    run(recipe)
    assert CALLS == []


@pytest.mark.slow
def test_an_output_that_comes_out_the_same_reruns_nothing_after_it(recipe: Path) -> None:
    run(recipe)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, "stages.one.stop=interrupt")
    run(recipe, "stages.one.stop=interrupt")
    assert CALLS == ["one"]


@pytest.mark.slow
def test_a_report_shows_no_numbers_of_other_artifacts_or_other_data(recipe: Path) -> None:
    def measured() -> dict[str, bool]:
        build([work], work)
        report = json_of(work / "report.json")
        shown = {record["name"]: bool(record.get("quality")) for record in report["artifacts"]}
        late = [line for line in report["not_measured"] if "run the recipe to its end" in line]
        assert bool(late) == (not all(shown.values()))
        assert all(
            name in " ".join(late) for name, found in shown.items() if not found and len(set(shown.values())) > 1
        )
        return shown

    work = run(recipe).workdir
    assert measured() == {"base": True, "one": True, "two": True, "three": True}
    with pytest.raises(KeyboardInterrupt):
        run(recipe, "stages.two.by=9", "stages.three.stop=interrupt")
    assert measured() == {"base": True, "one": True, "two": False}
    run(recipe)
    assert measured() == {"base": True, "one": True, "two": True, "three": True}
    (recipe.parent / "eval.txt").write_text("the cat\n" * 4)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, "stages.two.stop=interrupt")
    assert measured() == {"base": False, "one": False}


@pytest.mark.slow
def test_a_run_hands_the_map_of_layers_on(recipe: Path) -> None:
    """From stage to stage, into the plan, and into the key of what comes after."""
    stages = (
        "stages=[{type: drop_layers, name: short, keep: 2},"
        " {type: distill, name: taught, teacher: base, terms: [causal_kv, hidden_mse], train: {steps: 1}},"
        " {type: learn_masks, name: masks, method: magnitude}, {type: prune, name: small, keep: 1/2}]"
    )
    settings = ("model.config.n_layer=4", stages, "measure=[size]")
    done = run(recipe, *settings)
    assert all(done.artifacts[name].manifest.layers == {"decoder": [0, 3]} for name in ("short", "taught", "small"))
    planned = {row.name: row.parameters for row in make_plan(Inputs(read_recipe(recipe, settings), done.workdir)).rows}
    for name, artifact in done.artifacts.items():
        assert planned[name] == sum(tensor.numel() for tensor in stock_tensors(artifact.model())) or name == "masks"
    assert {record["name"]: record["parameters"] for record in done.records} == planned
    changed = states(recipe, settings[0], stages.replace("keep: 2}", "keep: [1, 3]}"))
    assert changed["short"] == "runs"
    given = (
        f"model={{path: {done.artifacts['short'].path}}}",
        stages.replace("keep: 2}", "keep: 1}"),
        "measure=[size]",
    )
    assert Inputs(read_recipe(recipe, given), done.workdir).shape("base").layers == {"decoder": [0, 3]}
    again = run(recipe, *given, workdir="again")
    assert again.artifacts["small"].manifest.layers == {"decoder": [3]}


@pytest.mark.slow
def test_names_are_no_part_of_a_key(recipe: Path) -> None:
    first = run(recipe)
    recipe.write_text(
        RECIPE.replace("name: two", "name: zwei")
        .replace("source: one", "source: eins")
        .replace("name: one", "name: eins")
    )
    second = run(recipe)
    assert CALLS == ["count"]  # numbers are filed under names
    assert second.artifacts["zwei"].digest == first.artifacts["two"].digest


@pytest.mark.slow
def test_what_a_result_depends_on_is_in_its_key(recipe: Path) -> None:
    run(recipe)
    for setting in ("seed=1", "data.block=4", "model.config.n_embd=16", "model.tokenizer.train_bpe=261"):
        assert states(recipe, setting)["one"] == "runs", setting


@pytest.mark.slow
def test_the_content_of_data_is_in_the_key_but_not_its_place(recipe: Path) -> None:
    run(recipe)
    (recipe.parent / "moved.txt").write_text((recipe.parent / "eval.txt").read_text())
    assert states(recipe, "data.eval={text: moved.txt}")["one"] == "reused"
    (recipe.parent / "eval.txt").write_text("the dog sat on the mat\n" * 4)
    assert states(recipe)["one"] == "runs"


def test_a_key_covers_type_version_config_seed_inputs_and_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(stage: Stage | None = None, seed: int = 0, **inputs: str) -> str:
        return stage_key(stage or Shift(), seed=seed, inputs=inputs)

    first = found()
    assert re.fullmatch("[0-9a-f]{12}", first)
    assert first == found(Shift(name="x", source="y"))
    keys = [first, found(Shift(by=2)), found(seed=1), found(source="a"), found(source="b"), found(teacher="a")]
    monkeypatch.setattr(Shift, "version", 2)
    keys.append(found())
    monkeypatch.setattr("compress.pipeline.keys.installed", lambda name: "0.0")
    keys.append(found())
    assert len(set(keys)) == len(keys)


def test_packages_are_those_that_compute() -> None:
    assert set(packages()) == {"compress-lm", "torch", "transformers", "accelerate"}
    assert "onnxruntime" in packages(frozenset({"onnx"}))
    assert key({"a": 1, "b": 2}) == key({"b": 2, "a": 1})


@pytest.mark.slow
def test_the_tokenizer_is_part_of_what_a_model_is(recipe: Path, tmp_path: Path) -> None:
    base = run(recipe).artifacts["base"]
    other = tmp_path / "other"
    shutil.copytree(base.path, other)
    assert identity(adopt(other)) == identity(base)
    settings = json_of(other / "tokenizer.json")
    settings["normalizer"] = {"type": "Lowercase"}
    (other / "tokenizer.json").write_text(json.dumps(settings))
    assert adopt(other).digest == base.digest
    assert identity(adopt(other)) != identity(base)


@pytest.mark.slow
def test_an_interrupted_stage_continues_in_its_partial_directory(recipe: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(recipe, "stages.two.stop=interrupt")
    work = recipe.parent / "work"
    partial = next(work.glob("02-two-*.partial"))
    assert (partial / "checkpoints" / "begun").exists()
    assert [stage["name"] for stage in json_of(work / "run.json")["stages"]] == ["one"]
    assert states(recipe, "stages.two.stop=interrupt")["two"] == "continued"
    done = run(recipe, "stages.two.stop=interrupt")
    assert CALLS == ["two", "three", "count"]
    assert not partial.exists()
    assert not (done.artifacts["two"].path / "checkpoints").exists()


@pytest.mark.slow
def test_a_stage_that_does_nothing_fails_and_keeps_what_was_before(recipe: Path) -> None:
    with pytest.raises(NothingDoneError, match="two: none of 9 modules was touched"):
        run(recipe, "stages.two.stop=nothing")
    assert states(recipe)["one"] == "reused"
    assert not list((recipe.parent / "work").glob("*two*[0-9a-f]"))


@pytest.mark.slow
def test_a_damaged_result_is_reported_and_not_reused(recipe: Path) -> None:
    done = run(recipe)
    weights = done.artifacts["one"].path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ModelError, match=r"01-one-\w+: model.safetensors has changed since the artifact was saved"):
        run(recipe)


@pytest.mark.slow
def test_a_result_without_its_manifest_is_made_again(recipe: Path) -> None:
    first = run(recipe)
    path = first.artifacts["one"].path
    (path / MANIFEST).unlink()
    (path / "left.txt").write_text("of what was there")
    assert states(recipe)["one"] == "runs"
    CALLS.clear()
    console = Console(record=True, width=200)
    second = compress.run(read_recipe(recipe), recipe.parent / "work", console=console)
    assert CALLS == ["one"]
    assert second.artifacts["one"].digest == first.artifacts["one"].digest
    assert not (path / "left.txt").exists()
    assert f"{path.name} has no artifact.json, so it is incomplete; one runs again" in console.export_text()
    run(recipe)
    assert CALLS == []


@pytest.mark.slow
@pytest.mark.parametrize("content", [b"", b'{"format": 1, "fam', b"\x00" * 64], ids=["empty", "cut", "zeros"])
def test_a_torn_manifest_is_one_line_that_says_what_to_do(recipe: Path, content: bytes) -> None:
    path = run(recipe).artifacts["two"].path
    (path / MANIFEST).write_bytes(content)
    for attempt in (run, states):
        with pytest.raises(
            ModelError, match=r"two-\w+/artifact\.json: Invalid JSON.*; delete 02-two-\w+ and run again"
        ) as e:
            attempt(recipe)
        assert "\n" not in str(e.value)
    shutil.rmtree(path)
    run(recipe)
    assert CALLS == ["two"]


@pytest.mark.slow
def test_a_torn_record_of_numbers_is_measured_again(recipe: Path) -> None:
    first = run(recipe)
    record = next((first.workdir / "measured").iterdir())
    record.write_text(record.read_text()[:-9])
    assert run(recipe).records == first.records
    assert CALLS == ["count"]


@pytest.mark.slow
def test_a_model_from_a_config_is_seeded_and_stock(recipe: Path) -> None:
    first, second, third = run(recipe), run(recipe, workdir="again"), run(recipe, "seed=5", workdir="other")
    assert first.artifacts["base"].digest == second.artifacts["base"].digest != third.artifacts["base"].digest
    config = first.artifacts["base"].config()
    tokenizer = load_tokenizer(first.artifacts["base"].path)
    assert config.vocab_size == len(tokenizer) == 262
    assert config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.decode(tokenizer("the dög\n")["input_ids"]) == "the dög\n"


@pytest.mark.slow
def test_models_with_other_tokenizers_are_measured_on_their_own_tokens(recipe: Path) -> None:
    base = RECIPE.splitlines()[3].removeprefix("model: ")
    models = f"models:\n  base: {base}\n  big: {base.replace('262', '280')}"
    recipe.write_text(RECIPE.replace(f"model: {base}", models))
    done = run(recipe)
    tokens = {record["name"]: record["quality"]["base10"] for record in done.records}
    assert CALLS.count("count") == 2
    assert tokens["big"] < tokens["base"] == tokens["three"]


@pytest.mark.slow
def test_the_teacher_is_in_the_key(recipe: Path) -> None:
    base = RECIPE.splitlines()[3].removeprefix("model: ")
    models = f"models:\n  base: {base}\n  big: {base}"
    recipe.write_text(RECIPE.replace(f"model: {base}", models).replace("name: two,", "name: two, teacher: big,"))
    done = run(recipe)
    assert done.artifacts["two"].manifest.lineage[-1].inputs["teacher"] == done.artifacts["big"].digest
    run(recipe, "models.big.config.n_embd=16")
    assert CALLS == ["two", "count"]


@pytest.mark.slow
def test_measurements_join_and_are_reused_one_by_one(recipe: Path) -> None:
    run(recipe)
    recipe.write_text(RECIPE + "  - {type: count, base: 2, of: [one]}\n")
    done = run(recipe)
    assert CALLS == ["count"]
    records = {record["name"]: record["quality"] for record in done.records}
    assert set(records["one"]) == {"base10", "base2"}
    assert set(records["two"]) == {"base10"}


@pytest.mark.slow
def test_two_splits_of_one_artifact_are_both_kept_and_shown(recipe: Path) -> None:
    (recipe.parent / "test.txt").write_text("the mat ran to the dog\n" * 4)
    start, _ = RECIPE.replace("eval: {text", "test: {text: test.txt}, eval: {text").split("  - count")
    recipe.write_text(start + "  - {type: quality, split: eval, batch: 2, of: [one]}\n")
    alone = next(record for record in run(recipe).records if record["name"] == "one")["quality"]
    recipe.write_text(
        start + "  - {type: quality, of: [one, two]}\n  - {type: quality, split: eval, batch: 2, of: [one]}\n"
    )
    done = run(recipe)
    records = {record["name"]: record for record in done.records}
    found, conditions = records["one"]["quality"], records["one"]["conditions"]
    assert found["perplexity (split eval, batch 2)"] == alone["perplexity"] != found["perplexity"]
    assert (conditions["quality"]["split"], conditions["quality"]["batch"]) == ("data.test", 8)
    again = conditions["quality (split eval, batch 2)"]
    assert (again["split"], again["batch"]) == ("data.eval", 2)
    assert "(" not in "".join([*records["two"]["quality"], *records["two"]["conditions"]])
    build([done.workdir], done.workdir)
    report = {record["name"]: record for record in json_of(done.workdir / "report.json")["artifacts"]}
    assert report["one"]["quality"] == found and report["one"]["conditions"] == conditions
    text = (done.workdir / "report.md").read_text()
    assert "| perplexity (split eval, batch 2) |" in text
    assert all(f"| {number(value)} |" in text for value in (found["perplexity"], alone["perplexity"]))
    assert "quality (split eval, batch 2).split: data.eval" in text


@pytest.mark.slow
def test_artifacts_on_different_splits_share_no_column(recipe: Path) -> None:
    (recipe.parent / "test.txt").write_text("the mat ran to the dog\n" * 4)
    start, _ = RECIPE.replace("eval: {text", "test: {text: test.txt}, eval: {text").split("  - count")
    recipe.write_text(start + "  - {type: quality, of: one}\n  - {type: quality, split: eval, batch: 2, of: two}\n")
    done = run(recipe)
    one, two = ({record["name"]: record for record in done.records}[name] for name in ("one", "two"))
    assert "perplexity" in one["quality"]
    assert {name for name in two["quality"] if not name.endswith(" (split eval, batch 2)")} == set()
    assert list(two["conditions"]) == ["quality (split eval, batch 2)"]
    assert two["conditions"]["quality (split eval, batch 2)"]["split"] == "data.eval"
    build([done.workdir], done.workdir)
    lines = [line.strip("| ").split(" | ") for line in (done.workdir / "report.md").read_text().splitlines()]
    header = next(line for line in lines if line[0] == "artifact" and "perplexity" in line)
    cells = {line[0]: dict(zip(header, line, strict=True)) for line in lines if len(line) == len(header)}
    assert cells["one"]["perplexity"] == number(one["quality"]["perplexity"])
    assert (cells["two"]["perplexity"], cells["one"]["perplexity (split eval, batch 2)"]) == ("–", "–")
    assert cells["two"]["perplexity (split eval, batch 2)"] == number(
        two["quality"]["perplexity (split eval, batch 2)"]
    )


@pytest.mark.parametrize(
    ("split", "settings", "way"),
    [
        ("data.test", {"batch": 2}, ""),  # other settings are described by the conditions alone
        ("data.eval", {"split": "eval"}, " (split eval)"),
        ("data.test", {"split": "eval"}, ""),  # the one split there is
    ],
)
def test_what_counts_is_the_split_that_was_measured(split: str, settings: dict[str, Any], way: str) -> None:
    plain: Plain = {}
    records: list[dict[str, Any]] = [{"name": "one"}, {"name": "two"}]
    for record, chosen, data in zip(records, ({}, settings), ("data.test", split), strict=True):
        measurement = Quality.model_validate(chosen)
        numbers = {"quality": {"perplexity": 9.0}, "conditions": {"quality": {"split": data}}}
        join(record, numbers, measurement, plain)
    assert [list(record["quality"]) for record in records] == [["perplexity"], [f"perplexity{way}"]]
    assert [list(record["conditions"]) for record in records] == [["quality"], [f"quality{way}"]]


def test_a_later_measurement_stands_beside_the_first() -> None:
    first = Quality()
    later = Quality.model_validate({"metric": ["perplexity", "bleu"], "split": "eval", "decoding": {"num_beams": 4}})
    record: dict[str, Any] = {"name": "one"}
    plain: Plain = {}
    measured = {"quality": {"perplexity": 9.0}, "conditions": {"quality": {"split": "data.test"}}}
    join(record, measured, first, plain)
    again = {"quality": {"perplexity": 8.0, "bleu": 3.0}, "conditions": {"quality": {"split": "data.eval"}}}
    join(record, again, later, plain)
    assert record == {
        "name": "one",
        "quality": {
            "perplexity": 9.0,
            "perplexity (split eval, num_beams 4)": 8.0,
            "bleu (split eval, num_beams 4)": 3.0,
        },
        "conditions": {
            "quality": {"split": "data.test"},
            "quality (split eval, num_beams 4)": {"split": "data.eval"},
        },
    }


def test_every_number_has_the_name_of_its_conditions() -> None:
    """The plain names go to one split; an artifact that is not measured so first still has a name for each way."""
    plain: Plain = {}
    records: dict[str, dict[str, Any]] = {"base": {"name": "base"}, "q": {"name": "q"}}
    for names, split, batch in ("base", "eval", 2), ("base q", "test", 4), ("q", "eval", 8), ("q", "eval", 2):
        measurement = Quality.model_validate({"split": split, "batch": batch})
        described = {"split": f"data.{split}", "batch": batch}
        for name in names.split():
            numbers = {"quality": {"perplexity": f"{split} {batch}"}, "conditions": {"quality": described}}
            join(records[name], numbers, measurement, plain)
    assert records["q"]["quality"] == {
        "perplexity (split test, batch 4)": "test 4", "perplexity": "eval 8", "perplexity (batch 2)": "eval 2",
    }  # fmt: skip
    assert records["base"]["quality"] == {"perplexity": "eval 2", "perplexity (split test, batch 4)": "test 4"}
    for record in records.values():
        for name, figure in record["quality"].items():
            how = record["conditions"][name.replace("perplexity", "quality")]
            assert figure == f"{how['split'].removeprefix('data.')} {how['batch']}"


def test_what_differs_in_the_metric_alone_has_the_same_conditions() -> None:
    plain: Plain = {}
    record: dict[str, Any] = {"name": "one"}
    for metric, details in {"perplexity": {}, "bleu": {"bleu": "b"}, "chrf": {"chrf": "c"}}.items():
        numbers = {"quality": {metric: 1.0}, "conditions": {"quality": {"split": "data.test", "signatures": details}}}
        join(record, numbers, Quality.model_validate({"metric": metric}), plain)
    assert list(record["quality"]) == ["perplexity", "bleu", "chrf"]
    assert record["conditions"] == {"quality": {"split": "data.test", "signatures": {"bleu": "b", "chrf": "c"}}}


def test_settings_that_a_metric_does_not_read_are_not_in_its_name() -> None:
    plain: Plain = {}
    record: dict[str, Any] = {"name": "one"}
    for settings in (
        {"metric": "bleu", "decoding": {"max_new_tokens": 5}},
        {"metric": "perplexity"},
        {"metric": "agreement", "reference": "two"},
        {"metric": "bleu", "decoding": {"max_new_tokens": 9}},
        {"metric": "perplexity", "batch": 2},
    ):
        numbers = {"quality": {settings["metric"]: 1.0}, "conditions": {"quality": {"split": "data.test"}}}
        join(record, numbers, Quality.model_validate(settings), plain)
    assert list(record["quality"]) == [
        "bleu", "perplexity", "agreement", "bleu (max_new_tokens 9)", "perplexity (batch 2)"
    ]  # fmt: skip


def test_what_two_measurements_do_otherwise() -> None:
    assert difference(Quality(), Quality(of=("one",))) == ""
    assert difference(Quality(), Quality.model_validate({"metric": "bleu"})) == ""
    searched = {"metric": "bleu", "decoding": {"num_beams": 4}}
    ruled = {"metric": "bleu", "decoding": {"num_beams": 4, "no_repeat_ngram_size": 3}}
    pair = [Quality.model_validate(each) for each in (ruled, searched)]
    assert difference(*pair) == "no_repeat_ngram_size 0"  # a dump leaves it out at its default
    assert difference(*reversed(pair)) == "no_repeat_ngram_size 3"
    slow, fast = Speed(prompt_tokens=8, threads=2), Speed(prompt_tokens=8, new_tokens=4)
    assert difference(slow, fast) == "new_tokens 4, threads default"


@pytest.mark.slow
def test_numbers_are_taken_again_on_another_machine(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(recipe)
    monkeypatch.setattr("compress.pipeline.machine._processor", lambda: "another")
    run(recipe)
    assert CALLS == ["count"]


@pytest.mark.slow
def test_a_sealed_artifact_is_a_model_with_its_traits(recipe: Path) -> None:
    stages = (
        "stages:\n  - {type: learn_masks, name: masks, method: magnitude}\n  - {type: prune, name: small, keep: 1/2}\n"
    )
    recipe.write_text(RECIPE.split("stages:")[0] + stages)
    done = run(recipe)
    masks = done.artifacts["masks"].path
    recipe.write_text(f"version: 1\nname: next\nmodel: {masks}\nstages: [{{type: prune, name: small, keep: 1/2}}]\n")
    rows = {row.name: row for row in make_plan(Inputs(read_recipe(recipe), recipe.parent / "next")).rows}
    assert rows["base"].traits == ("masked",)
    assert rows["small"].traits == ("pruned",)
    again = run(recipe, workdir="next")
    assert again.artifacts["small"].digest == done.artifacts["small"].digest
    recipe.write_text(f"version: 1\nname: next\nmodel: {masks}\nstages: [export_onnx]\n")
    with pytest.raises(RecipeError, match=r"stages\[0\]: export_onnx cannot work on a model that is masked"):
        run(recipe)


def test_nothing_is_written_when_something_is_wrong(recipe: Path) -> None:
    with pytest.raises(RecipeError):
        run(recipe, "data.block=64")
    assert not (recipe.parent / "work").exists()


@pytest.mark.slow
def test_two_runs_do_not_share_a_directory(recipe: Path) -> None:
    with locked(recipe.parent / "work"), pytest.raises(UserError, match="another run is using it"):
        run(recipe)


def test_a_workdir_that_is_a_file_is_reported(recipe: Path) -> None:
    with pytest.raises(UserError, match="is a file, not a directory"):
        run(recipe, workdir="eval.txt")


@pytest.mark.slow
def test_run_takes_a_path_and_says_what_it_does(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(recipe.parent)
    console = Console(record=True, width=120)
    done = compress.run("recipe.yaml", console=console)
    assert done.workdir == Path("runs/tiny")
    text = console.export_text()
    assert re.search(r"✓ two  shift  1/9 modules  by 2  \d+\.\d s", text)
    compress.run(str(recipe), console=console)
    assert "= two  shift  1/9 modules  by 2  reused" in console.export_text()


@pytest.mark.slow
def test_what_was_run_is_written_down(recipe: Path) -> None:
    done = run(recipe, "stages.two.by=4")
    text = (done.workdir / "recipe.yaml").read_text()
    assert text.startswith(f"# As run. Relative paths start from {recipe.parent}")
    assert "by: 4" in text


def test_cuda_is_refused_where_there_is_none(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert choose_device(None) == "cpu"
    with pytest.raises(UserError, match="device: cuda is not possible"):
        compress.run(recipe, recipe.parent / "work", device="cuda")
    assert not (recipe.parent / "work").exists()


@pytest.mark.parametrize("setting", ["n_head=3", "n_embd=0.5", "vocab_size=many", "activation_function=softly"])
def test_a_config_of_no_model_is_reported(recipe: Path, setting: str) -> None:
    with pytest.raises(RecipeError, match=r"models\.base\.config: cannot build a gpt2 model from it"):
        states(recipe, f"model.config.{setting}")


@pytest.mark.slow
def test_a_teacher_with_another_vocabulary_is_reported(recipe: Path) -> None:
    def models(words: str, size: int) -> str:
        train_bpe([words * 9], size, GPT2).save_pretrained(recipe.parent / "tokenizer")
        base = RECIPE.splitlines()[3].removeprefix("model: ")
        big = base.replace("n_layer", "vocab_size: 262, n_layer").replace("{train_bpe: 262}", "tokenizer")
        return f"models:\n  base: {base}\n  big: {big}\n{rest}"

    rest = "data: {train: {text: train.txt}, block: 8}\nstages: [{type: distill, teacher: big, train: {steps: 1}}]\n"
    head = "version: 1\nname: tiny\n"
    recipe.write_text(head + models("zzz yyy xxx ", 262))
    with pytest.raises(
        RecipeError, match=r"stages\[0\]\.teacher: 'big' has another vocabulary than the student 'base'"
    ):
        states(recipe)
    recipe.write_text(head + models((recipe.parent / "train.txt").read_text(), 260))
    assert states(recipe)["distill"] == "runs"  # two tokens fewer, and no token with another meaning


@pytest.mark.slow
def test_a_base_that_was_not_copied_whole_is_reported_before_any_work(recipe: Path, tmp_path: Path) -> None:
    base = shutil.copytree(run(recipe).artifacts["base"].path, tmp_path / "given")
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(RecipeError, match=r"models\.base: .*: cannot read model.safetensors"):
        states(recipe, "model={path: given}")


@pytest.mark.slow
def test_a_base_without_weights_is_reported_before_any_work(recipe: Path, tmp_path: Path) -> None:
    base = shutil.copytree(run(recipe).artifacts["base"].path, tmp_path / "given")
    (base / "model.safetensors").unlink()
    with pytest.raises(RecipeError, match=r"models\.base: .*given: contains no \.safetensors file"):
        states(recipe, "model={path: given}")


def test_identity_covers_how_a_model_computes_and_what_was_cut(tmp_path: Path, tiny_gpt2: Any) -> None:
    """The same codes with other activations, or the same tensors cut from other units, are another model."""
    tiny_gpt2(layers=1).save_pretrained(tmp_path / "base")
    artifact = adopt(tmp_path / "base")
    changes: list[dict[str, Any]] = [{"kept": {"hidden": [0, 1]}}, {"kept": {"hidden": [0, 2]}}]
    changes += [{"layers": {"decoder": [0]}}, {"layers": {"decoder": [1]}}]
    for activations in ("block", "none"):
        spec = {
            "module": "lm_head", "shape": (4, 32), "bits": 2, "granularity": "tensor", "block": 32,
            "method": "dynamic_scaling", "activations": activations,
        }  # fmt: skip
        changes.append({"quantization": QuantizationSpec.model_validate({"matrices": [spec]})})
    found = [
        identity(Artifact(artifact.path, artifact.manifest.model_copy(update=change))) for change in ({}, *changes)
    ]
    assert len(set(found)) == 7
