"""Imports go down the floors of docs/design.md, and heavy libraries stay where they belong."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "compress").rglob("*.py"))
FLOORS = {
    "errors": 0,
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


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_model_names_live_in_models(file: Path) -> None:
    if part(file) == "models":
        return
    names = {node.value for node in ast.walk(parsed(file)) if isinstance(node, ast.Constant)}
    assert not names & {"gpt2", "bart", "GPT2LMHeadModel", "BartForConditionalGeneration"}


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
