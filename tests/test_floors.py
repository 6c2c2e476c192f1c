"""Imports go down the floors of docs/design.md, and heavy libraries stay where they belong."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES as SEQ2SEQ

from compress import errors
from compress.models.families import BUILT_IN
from compress.models.family import ModelFamily

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "compress").rglob("*.py"))
FLOORS = {
    "errors": 0,
    "problem": 0,
    "files": 0,
    "schema": 0,
    "registry": 0,
    "functional": 1,
    "distributed": 1,
    "models": 2,
    "surgery": 3,
    "artifact": 4,
    "data": 4,
    "onnx": 4,
    "training": 5,
    "terms": 6,
    "generation": 6,
    "measure": 7,
    "engine": 7,
    "api": 8,
    "stages": 8,
    "recipe": 9,
    "pipeline": 10,
    "report": 10,
    "plots": 11,
    "cli": 11,
    "__main__": 12,
}
ONLY_IN = {
    "transformers": {"models", "artifact", "data", "generation"},
    "onnx": {"onnx"},
    "onnxruntime": {"onnx"},
    "onnxscript": {"onnx"},
    "onnx_ir": {"onnx"},
    "accelerate": {"training", "distributed"},
    "typer": {"cli"},
    "pickle": set(),
}


def part(file: Path) -> str:
    """The module or package directly under ``compress`` that a file belongs to."""
    return file.relative_to(ROOT / "compress").parts[0].removesuffix(".py")


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            if node.module == "compress":
                yield from (f"compress.{alias.name}" for alias in node.names)
            else:
                yield str(node.module)


def parsed(file: Path) -> ast.AST:
    return ast.parse(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_only_go_down(file: Path) -> None:
    here = part(file)
    if here == "__init__":
        return
    for name in imported(parsed(file)):
        target = name.split(".")[1] if name.startswith("compress.") else None
        if target in (None, "__version__", here):
            continue
        ground = FLOORS[here] == FLOORS[target] == 0
        assert ground or FLOORS[target] < FLOORS[here], f"{file.name} (floor {FLOORS[here]}) imports {name}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_heavy_libraries_stay_in_their_places(file: Path) -> None:
    for name in imported(parsed(file)):
        library = name.split(".")[0]
        assert part(file) in ONLY_IN.get(library, {part(file)}), f"{file.name} imports {name}"


def tables(value: Any) -> Iterator[Any]:
    """A family and every table below it."""
    yield value
    for each in fields(value):
        below = getattr(value, each.name)
        for table in below if isinstance(below, tuple) else [below]:
            if is_dataclass(table):
                yield from tables(table)


def config_fields(family: ModelFamily) -> set[str]:
    """Every name in a family's tables that is a field of its stock config."""
    config = AutoConfig.for_model(family.model_types[0])
    found: set[str] = set(family.refused)
    for table in tables(family):
        for each in fields(table):
            value = getattr(table, each.name)
            found |= set(value if isinstance(value, tuple | Mapping) else [value]) & set(config.to_dict())
            found |= set(value) if each.name in ("fields", "rotary_settings") else set()
    return found


CONFIG_FIELDS = frozenset().union(*(config_fields(family) for family in BUILT_IN))
OWN_NAMES = {
    ("terms/token_contrastive.py", "hidden_size"),  # of a Side, which measures it on tensors
    # a machine that only serves has no torch, and therefore no family tables
    ("onnx/runtime/opening.py", "n_positions"),
    ("onnx/runtime/opening.py", "max_position_embeddings"),
}
OUTSIDE_FAMILIES = [file for file in FILES if file.parent != ROOT / "compress" / "models" / "families"]


def config_reads(tree: ast.AST) -> set[str]:
    """Fields of stock configs that code names: attributes, strings (of getattr, setattr, keys), keyword arguments."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
        elif isinstance(node, ast.keyword) and node.arg:
            found.add(node.arg)
    return found & CONFIG_FIELDS


@pytest.mark.parametrize("file", OUTSIDE_FAMILIES, ids=lambda file: str(file.relative_to(ROOT)))
def test_only_families_name_families_and_fields_of_their_configs(file: Path) -> None:
    name = file.relative_to(ROOT / "compress").as_posix()
    tree = parsed(file)
    assert {field for field in config_reads(tree) if (name, field) not in OWN_NAMES} == set()
    constants = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    classes = {name for auto in (CAUSAL, SEQ2SEQ) for kind, name in auto.items() if kind in FAMILY_NAMES}
    assert not constants & (FAMILY_NAMES | classes)


FAMILY_NAMES = {name for family in BUILT_IN for name in (family.name, *family.model_types)}


def test_the_fields_that_are_looked_for_are_those_of_every_family() -> None:
    assert {"n_embd", "d_model", "num_key_value_heads", "head_dim", "rope_scaling", "hidden_act"} <= CONFIG_FIELDS
    assert {"scale_attn_weights", "add_cross_attention", "scale_embedding", "decoder_layers"} <= CONFIG_FIELDS
    for code in ("model.config.d_model", "getattr(config, 'n_head')", "config['n_inner']", "with_(n_layer=2)"):
        assert config_reads(ast.parse(code)), code
    assert not config_reads(ast.parse("config.vocab_size, config.tie_word_embeddings, hidden.layers"))


def test_the_runtime_finds_the_context_of_every_family() -> None:
    assert {family.context for family in BUILT_IN} == {
        name for file, name in OWN_NAMES if file == "onnx/runtime/opening.py"
    }


def test_every_part_has_a_floor() -> None:
    assert {part(file) for file in FILES} - {"__init__"} == set(FLOORS)


def test_functional_needs_torch_alone() -> None:
    for file in (ROOT / "compress" / "functional").glob("*.py"):
        for name in imported(parsed(file)):
            assert name.split(".")[0] in {"torch", "compress", *sys.stdlib_module_names}, f"{file.name} imports {name}"


def importing(code: str, *blocked: str) -> subprocess.CompletedProcess[str]:
    lines = ["import sys", *(f"sys.modules[{name!r}] = None" for name in blocked), code]
    return subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize("module", ["compress", "compress.errors", "compress.registry", "compress.cli"])
def test_light_imports_load_no_torch(module: str) -> None:
    done = importing(f"import {module}\nassert not {{'torch', 'transformers', 'onnxruntime'}} & set(sys.modules)")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("module", ["compress.onnx.runtime", "compress.report", "compress.cli.generate"])
def test_deployment_and_report_need_neither_torch_nor_transformers(module: str) -> None:
    done = importing(f"import {module}", "torch", "transformers", "datasets", "onnx")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_package_gives_its_public_names_lazily() -> None:
    code = (
        "import compress\n"
        "assert dir(compress) == sorted(compress.__all__)\n"
        "assert compress.__version__\n"
        "assert 'torch' not in sys.modules\n"
        "named = set(compress.__all__) - {'__version__', 'plots'}\n"
        "assert all(callable(getattr(compress, name)) for name in named)\n"
        "assert callable(compress.plots.training)\n"
        "assert 'torch' in sys.modules"
    )
    done = importing(code)
    assert done.returncode == 0, done.stderr


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    import compress

    with pytest.raises(AttributeError, match="no attribute 'shrink'"):
        compress.shrink  # noqa: B018


OWN_ERRORS = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}


def texts_read(tree: ast.AST) -> set[int]:
    """Lines that take an error of this package, or the text of a problem, as prose.

    A handler may read ``error.problem`` and raise from the error. Nothing may call a method of ``problem.text``,
    compare it, or pass it to a regular expression.
    """
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and node.name and OWN_ERRORS & names_in(node.type):
            allowed = {
                id(part.value) for part in ast.walk(node) if isinstance(part, ast.Attribute) and part.attr == "problem"
            } | {id(part.cause) for part in ast.walk(node) if isinstance(part, ast.Raise)}
            for part in ast.walk(node):
                if isinstance(part, ast.Name) and part.id == node.name and id(part) not in allowed:
                    found.add(part.lineno)
        for part in worked_on(node):
            if isinstance(part, ast.Attribute) and part.attr == "text" and "problem" in ast.unparse(part.value):
                found.add(part.lineno)
    return found


def names_in(tree: ast.AST | None) -> set[str]:
    parts = list(ast.walk(tree)) if tree else []
    return {part.id for part in parts if isinstance(part, ast.Name)} | {
        part.attr for part in parts if isinstance(part, ast.Attribute)
    }


def worked_on(node: ast.AST) -> list[ast.expr]:
    """Expressions that a node calls a method of, compares, slices, or searches with a regular expression."""
    if isinstance(node, ast.Attribute | ast.Subscript):
        return [node.value]
    if isinstance(node, ast.Compare):
        return [node.left, *node.comparators]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and "re" in names_in(node.func):
        return node.args
    return []


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_module_reads_the_text_of_a_problem(file: Path) -> None:
    assert not texts_read(parsed(file))


def test_the_readers_of_texts_that_are_looked_for_are_found() -> None:
    handler = "try:\n    run()\nexcept {}"
    for code in (
        handler.format("DataError as error: yield str(error).removeprefix('quality: ')"),
        handler.format("(OSError, ModelError) as error: text = error.args[0]"),
        handler.format("errors.ModelError as error: found = re.match('data', f'{error}')"),
        "field = problem.text.split(': ')[0]",
        "field = re.match('[a-z]+', item.problem.text)",
        "found = 'keep' in error.problem.text",
    ):
        assert texts_read(ast.parse(code)), code
    for code in (
        handler.format("ModelError as error: raise ModelError(error.problem.inside('keep')) from error"),
        handler.format("OSError as error: text = str(error).splitlines()[0]"),
        "text = f'{problem.text}; leave it out'",
    ):
        assert not texts_read(ast.parse(code)), code


SAME_NAME = {
    "fitting": "the stage's side and the engine's side of one thing",
    "plots": "figures of the report, and the public figures drawn with the same code",
    "units": "units of an axis, and units of measurement",
}
"""Base names that several packages use, and why."""


def test_base_names_do_not_repeat_without_need() -> None:
    names: dict[str, list[str]] = {}
    for file in FILES:
        if file.name != "__init__.py":
            names.setdefault(file.stem, []).append(str(file.relative_to(ROOT)))
    assert {name for name, places in names.items() if len(places) > 1} == set(SAME_NAME)


@pytest.mark.slow
def test_no_modules_import_each_other_in_a_circle() -> None:
    """Imports inside functions and under TYPE_CHECKING count."""
    modules = {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in FILES}
    edges = {
        name: {target for target in _targets(file, modules) if target != name} - CIRCLES.get(name, set())
        for name, file in modules.items()
    }
    while leaves := [name for name, targets in edges.items() if not targets & edges.keys()]:
        for name in leaves:
            del edges[name]
    in_a_circle = {name: sorted(targets & edges.keys()) for name, targets in edges.items()}
    assert not in_a_circle


CIRCLES: dict[str, set[str]] = {
    "compress.models.structure": {"compress.models.family"},  # for annotations alone
}


def _targets(file: Path, modules: dict[str, Path]) -> Iterator[str]:
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                if inner in modules:
                    yield inner
                elif node.module in modules and node.module != "compress":
                    yield node.module
