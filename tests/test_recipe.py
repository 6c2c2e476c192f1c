from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from compress.errors import CompressError, RecipeError, UserError
from compress.pipeline import Inputs, make_plan
from compress.recipe import Recipe, read_recipe
from compress.recipe.document import Document, override, parse_document, show, write_document

BAD = sorted((Path(__file__).parent / "bad_recipes").glob("*.yaml"))
GOOD = """
version: 1
name: gpt2-ptb-25x
seed: 7
model: {config: {model_type: gpt2, n_layer: 2, n_embd: 16, n_head: 4, n_positions: 32}, tokenizer: {train_bpe: 270}}
data:  {train: {text: lines.txt}, eval: {text: lines.txt}, test: {text: lines.txt}, block: 16}
stages:
  - {type: learn_masks, name: masks, teacher: base, axes: [hidden, heads, ffn],
     terms: [{type: forward_kl}, {type: mask_l1, weight: 1.0e-4}], train: {steps: 2000, lr: 1e-4}}
  - {type: prune,    name: pruned, source: masks, keep: 2/4}
  - {type: distill,  name: recovered, teacher: base,
     terms: [{type: adaptive_kl}, {type: causal_kv, weight: 0.1}], train: {epochs: 2}}
  - {type: quantize, name: small, teacher: base, weights: {bits: 2}, embedding: {bits: 2}, activations: {bits: 8},
     terms: [forward_kl, {type: token_contrastive, weight: 0.1}], train: {steps: 10}}
  - {type: export_onnx, name: base-onnx, source: base}
  - {type: export_onnx, name: small-onnx, source: small}
measure:
  - size
  - {type: quality, of: [base, recovered, small, small-onnx], metric: perplexity}
  - {type: speed, of: [base-onnx, small-onnx], prompt_tokens: 16, new_tokens: 8, batch: 1, threads: 2}
"""


@pytest.fixture
def good(tmp_path: Path) -> Path:
    (tmp_path / "lines.txt").write_text("the cat sat on the mat\nthe dog ran to the park\n" * 20)
    path = tmp_path / "good.yaml"
    path.write_text(GOOD)
    return path


def complaint(path: Path, settings: tuple[str, ...] = ()) -> str:
    with pytest.raises(CompressError) as caught:
        make_plan(Inputs(read_recipe(path, settings), Path("nowhere")))
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_there_are_enough_bad_recipes() -> None:
    assert len(BAD) >= 40


@pytest.mark.slow
@pytest.mark.parametrize("path", BAD, ids=lambda path: path.stem)
def test_a_bad_recipe_says_where_and_what(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    expected = path.read_text().splitlines()[0].removeprefix("# ")
    found = complaint(Path(path.name))
    if expected.endswith("..."):
        found = found[: len(expected) - 3] + "..."
    assert found == expected
    assert expected.startswith(path.name)


@pytest.mark.slow
def test_the_whole_of_a_good_recipe_is_planned(good: Path) -> None:
    plan = make_plan(Inputs(read_recipe(good), good.parent / "run"))
    rows = {row.name: row for row in plan.rows}
    assert list(rows) == ["base", "masks", "pruned", "recovered", "small", "base-onnx", "small-onnx"]
    assert rows["base"].state == "built"
    assert {row.state for row in plan.rows[1:]} == {"runs"}
    assert rows["recovered"].source == "pruned"
    assert rows["recovered"].traits == ("pruned",)
    assert rows["small-onnx"].traits == ("onnx", "pruned", "quantized")
    assert (rows["masks"].steps, rows["recovered"].steps) == ("2,000", "2 epochs")
    assert not (good.parent / "run").exists()


@pytest.mark.slow
def test_expected_parameters_are_those_of_the_cut_model(good: Path) -> None:
    rows = {row.name: row for row in make_plan(Inputs(read_recipe(good), good.parent / "run")).rows}

    def gpt2_parameters(hidden: int, inner: int, layers: int = 2, vocabulary: int = 270, positions: int = 32) -> int:
        attention = hidden * 3 * hidden + 3 * hidden + hidden * hidden + hidden
        ffn = hidden * inner + inner + inner * hidden + hidden
        return (vocabulary + positions) * hidden + layers * (attention + ffn + 4 * hidden) + 2 * hidden

    assert rows["base"].parameters == gpt2_parameters(16, 64)
    assert rows["pruned"].parameters == rows["small-onnx"].parameters == gpt2_parameters(8, 32)


def test_reading_gives_a_frozen_recipe(good: Path) -> None:
    recipe = read_recipe(good)
    assert recipe.stages[0].train.lr == 1e-4  # type: ignore[attr-defined]
    assert recipe.base == good.parent
    assert recipe.stage_names[-1] == "small-onnx"
    with pytest.raises(ValidationError):
        recipe.seed = 3  # type: ignore[misc]


def test_recipes_are_also_made_in_python() -> None:
    recipe = Recipe.model_validate({"version": 1, "name": "x", "model": "gpt2", "stages": ["export_onnx"]})
    assert recipe.models["base"].path == "gpt2"
    assert recipe.plain()["stages"][0]["type"] == "export_onnx"
    with pytest.raises(
        ValidationError,
        match="stages\\[0\\]\\.source: 'bse' does not exist before this stage; allowed: base",
    ):
        Recipe.model_validate(
            {"version": 1, "name": "x", "model": "gpt2", "stages": [{"type": "export_onnx", "source": "bse"}]}
        )


def test_what_was_run_can_be_read_again(good: Path) -> None:
    recipe = read_recipe(good, ["seed=9"])
    again = good.with_name("again.yaml")
    again.write_text(write_document(recipe.plain(), good.parent))
    assert read_recipe(again).model_dump() == recipe.model_dump()


@pytest.mark.parametrize(
    "path", ["stages[2].train.epochs=3", "stages.recovered.train.epochs=3", "stages.2.train.epochs=3"]
)
def test_set_reaches_a_stage_by_index_and_by_name(good: Path, path: str) -> None:
    recipe = read_recipe(good, [path])
    assert recipe.stages[2].train.epochs == 3  # type: ignore[attr-defined]


def test_set_values_are_yaml_and_later_ones_win(good: Path) -> None:
    settings = ["stages.pruned.keep={heads: 1/4}", "stages.masks.axes=[heads]", "seed=1", "seed=2", "data.max_source=8"]
    recipe = read_recipe(good, settings)
    assert recipe.stages[1].model_dump(mode="json")["keep"] == {"heads": "1/4"}
    assert recipe.stages[0].axes == ("heads",)  # type: ignore[attr-defined]
    assert recipe.seed == 2
    assert recipe.data is not None and recipe.data.max_source == 8


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ("seed", "--set seed: write it as path=value, such as stages[1].train.steps=10"),
        ("=3", "--set =3: write it as path=value, such as stages[1].train.steps=10"),
        ("stages[9].name=x", "--set stages[9].name=x: stages has 6 items, counted from 0"),
        ("seed.x=1", "--set seed.x=1: seed is 7, which has nothing inside; to replace it, set seed=..."),
        ("seed=[1", "--set seed:1: not valid YAML: expected ',' or ']', but got '<stream end>'"),
        (
            "stages.smal.name=x",
            "--set stages.smal.name=x: stages has no single item named 'smal'. Did you mean 'small'?",
        ),
        ("sede=1", "--set: unknown key 'sede'. Did you mean 'seed'?"),
        ("stages.masks.train.lr=-1", "--set: stages[0].train.lr is -1: it should be greater than or equal to 0"),
        ("data.eval={text: nowhere.txt}", "--set: data.eval: there is no file"),
    ],
)
def test_a_wrong_setting_is_reported_as_such(good: Path, setting: str, text: str) -> None:
    assert complaint(good, (setting,)).startswith(text)


def test_a_missing_recipe_and_a_directory_are_reported(tmp_path: Path) -> None:
    assert complaint(tmp_path / "none.yaml") == f"{tmp_path / 'none.yaml'}: no such recipe"
    assert complaint(tmp_path) == f"{tmp_path}: is a directory, not a recipe file"


def test_bytes_that_are_no_text_are_reported(tmp_path: Path) -> None:
    path = tmp_path / "bytes.yaml"
    path.write_bytes(b"name: \xff\n")
    assert complaint(path).startswith(f"{path}: is not UTF-8 text")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[("1e-4", 1e-4), ("1.", 1.0), (".5", 0.5), ("-3", -3), ("+.inf", float("inf")), ("~", None), ("", None)],
        *[("True", True), ("on", "on"), ("2/4", "2/4"), ("2024-01-01", "2024-01-01"), ("'7'", "7"), ("0x10", "0x10")],
        ("9" * 5000, float("inf")),  # beyond what Python reads as an integer
    ],
)
def test_plain_scalars_are_yaml_1_2(text: str, value: object) -> None:
    found = parse_document(f"key: {text}\n", "x").data["key"]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("a: 1\nb: {c: 1,\n  c: 2}\n", "x:3: b.c is given twice (first on line 2)"),
        ("? [a]\n: 1\n", "x:1: a key must be text"),
        ("a: !env HOME\n", "x:1: YAML tag '!env' is not allowed in a recipe"),
        ("a: &b [*b]\n", "x:1: an alias expands without end"),
        ("a: 1\n---\nb: 2\n", "x:2: not valid YAML: but found another document"),
        ("[" * 3000, "x: not valid YAML: brackets are nested too deeply"),
    ],
)
def test_yaml_that_is_no_plain_data_is_refused(text: str, error: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_document(text, "x")
    assert str(caught.value) == error


def test_aliases_cannot_multiply_without_bound() -> None:
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    with pytest.raises(RecipeError, match="without end"):
        parse_document("\n".join(lines), "x")


def test_an_alias_is_shared_text() -> None:
    assert parse_document("a: &t {steps: 3}\nb: *t\n", "x").data == {"a": {"steps": 3}, "b": {"steps": 3}}


TEXT = st.text(st.characters(codec="ascii", categories=["L", "N", "P", "Zs"]))
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abcxyz_1-", min_size=1), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@pytest.mark.slow
@given(st.dictionaries(st.text("abcdef", min_size=1), PLAIN, min_size=1, max_size=4))
def test_written_data_reads_back_the_same(data: dict[str, Any]) -> None:
    text = write_document(data, Path())
    found = parse_document(text, "x")
    assert found.data == data
    for location, origin in found.origins.items():
        if location:
            line = text.splitlines()[int(origin.split(":")[1]) - 1]
            assert line.strip()


@given(st.lists(st.sampled_from(["a", "b1", "c_d"]) | st.integers(0, 30), min_size=1, max_size=5))
def test_a_shown_location_is_a_setting_path(steps: list[str | int]) -> None:
    if isinstance(steps[0], int):
        steps = ["first", *steps]
    data: Any = 0
    for step in reversed(steps):
        data = {step: data} if isinstance(step, str) else [None] * step + [data]
    changed = override(Document(data, {}), [f"{show(steps)}=5"]).data
    for step in steps:
        changed = changed[step]
    assert changed == 5


def test_origins_name_the_line_of_the_nearest_value() -> None:
    found = parse_document("a:\n  b:\n    - 1\n    - {c: 2}\n", "x.yaml")
    assert [found.where(at) for at in [("a",), ("a", "b", 1, "c"), ("a", "b", 7), ("z",)]] == [
        "x.yaml:1", "x.yaml:4", "x.yaml:2", "x.yaml:1",
    ]  # fmt: skip


def test_every_message_is_one_line() -> None:
    for path in BAD:
        assert re.match(r"# \S+\.yaml(:\d+)?: \S", path.read_text().splitlines()[0]), path.name


def test_user_errors_exit_with_two() -> None:
    assert UserError.exit_code == RecipeError.exit_code == 2
