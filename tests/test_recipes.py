"""Every recipe that is shipped or shown in the documentation passes ``check``, with stand-ins for what it downloads."""

import json
import re
from pathlib import Path
from string import Formatter
from typing import Any

import pytest

from compress.data.sources import ParallelText, Source
from compress.pipeline import Inputs, Plan, make_plan
from compress.recipe import Recipe, read_recipe

ROOT = Path(__file__).parents[1]
RECIPES = sorted(ROOT.glob("recipes/**/*.yaml"))
SHOWN = [
    (page.name, block)
    for page in (ROOT / "README.md", ROOT / "docs" / "recipes.md")
    for block in re.findall(r"^```yaml\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
]
CONFIGS = {
    "gpt2": {"model_type": "gpt2", "n_layer": 1},
    "bart": {
        "model_type": "bart",
        "d_model": 768,
        "encoder_layers": 6,
        "decoder_layers": 6,
        "encoder_attention_heads": 12,
        "decoder_attention_heads": 12,
        "encoder_ffn_dim": 3072,
        "decoder_ffn_dim": 3072,
    },
}
"""GPT-2 small with one layer and BART-base, with less vocabulary; a plan builds neither."""
VOCABULARY = 262
TEXT = "the cat sat on the mat and the dog ran far "

each_recipe = pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")


def planned(path: Path, folder: Path, *more: str) -> Plan:
    """What ``check`` does, offline: a model or a source that is not in the repository is replaced."""
    settings = [*stand_ins(read_recipe(path), folder), *more]
    return make_plan(Inputs(read_recipe(path, settings), folder / "work"))


def stand_ins(recipe: Recipe, folder: Path) -> list[str]:
    """``--set`` overrides: stock configs for models, and rows with the same columns for data."""
    assert recipe.data is not None
    sources = {name: getattr(recipe.data, name) for name in ("train", "eval", "test")}
    sources = {name: source for name, source in sources.items() if source is not None}
    start = recipe.data.start(recipe.base)
    rows = {
        f"data.{name}": rows_like(source, folder / f"{name}.jsonl")
        for name, source in sources.items()
        if source.hub or not all((start / file).exists() for file in source.files)
    }
    stock = dict(CONFIGS["bart" if any(source.layout == "pair" for source in sources.values()) else "gpt2"])
    for spec in recipe.models.values():
        if isinstance(spec.config, dict) and "vocab_size" in spec.config:
            stock["vocab_size"] = spec.config["vocab_size"]  # a teacher and its student share it
    models = {}
    for name, spec in recipe.models.items():
        at = "model" if "model" in recipe.plain() else f"models.{name}"
        if spec.path is not None and not (recipe.base / spec.path).exists():
            models[at] = {"config": stock, "tokenizer": {"train_bpe": VOCABULARY}}
        elif spec.path is None and rows:
            models[f"{at}.tokenizer"] = {"train_bpe": VOCABULARY}
    return [f"{at}={json.dumps(value)}" for at, value in (rows | models).items()]


def rows_like(source: Source, path: Path) -> dict[str, Any]:
    """Write rows with the columns that ``source`` reads, and return a source that reads them."""
    columns = source.model_dump(include={"prompt", "response", "source", "target"}, exclude_none=True)
    if isinstance(source.text, ParallelText):
        columns = {"source": "source", "target": "target"}
    elif source.layout == "text":
        columns = {"column": source.column or "text"}
    names: set[str] = set()
    for value in columns.values():
        for text in (value,) if isinstance(value, str) else value:
            names |= {field for _, field, _, _ in Formatter().parse(text) if field} or {text}
    path.write_text(json.dumps(dict.fromkeys(names, TEXT)) + "\n")
    return {"json": str(path), **columns}


@pytest.mark.slow
@each_recipe
def test_every_shipped_recipe_is_sound(path: Path, tmp_path: Path) -> None:
    recipe = read_recipe(path)
    assert [row.name for row in planned(path, tmp_path).rows] == [*recipe.models, *recipe.stage_names]


@each_recipe
def test_every_shipped_recipe_says_what_it_is_and_what_to_expect(path: Path) -> None:
    header = path.read_text(encoding="utf-8").partition("version: 1")[0]
    for line in ("papers?", "hardware", "expected"):
        assert re.search(rf"^# {line}: +\S", header, flags=re.MULTILINE), f"{path.name} has no line '# {line}:'"


def test_names_of_recipes_differ() -> None:
    names = [read_recipe(path).name for path in RECIPES]
    assert len(set(names)) == len(names)


def test_penn_treebank_is_read_as_its_figures_were() -> None:
    """Its lines begin and end with a space, which would be scored."""
    texts = [*(path.read_text(encoding="utf-8") for path in RECIPES), *(block for _, block in SHOWN)]
    sources = [source for text in texts for source in re.findall(r"\{text: ptb\.[^}]*\}", text)]
    assert sources and all("strip: true" in source for source in sources)


@pytest.mark.slow
@pytest.mark.parametrize(("page", "block"), SHOWN)
def test_every_recipe_in_the_documentation_is_sound(page: str, block: str, tmp_path: Path) -> None:
    """A block without ``version`` is a part of a recipe."""
    path = tmp_path / "recipe.yaml"
    parts = {
        "version": "version: 1",
        "name": "name: shown",
        "model": "model: gpt2",
        "data": "data: {train: {text: train.txt}, test: {text: test.txt}}",
    }
    given = set(re.findall(r"^(\w+):", block, flags=re.MULTILINE))
    given |= {"model"} & {name.rstrip("s") for name in given}
    path.write_text("\n".join(text for key, text in parts.items() if key not in given) + "\n" + block)
    assert planned(path, tmp_path).rows


@pytest.mark.slow
def test_the_sizes_of_the_pruning_recipe_are_those_of_its_header(tmp_path: Path) -> None:
    path = ROOT / "recipes" / "gpt2" / "wikitext2-prune.yaml"
    real = json.dumps({"model_type": "gpt2", "vocab_size": 50257})
    sizes = {row.name: row.parameters for row in planned(path, tmp_path, f"model.config={real}").rows}
    assert [sizes[name] for name in ("large", "medium", "small")] == [91_903_360, 64_085_504, 40_986_240]
