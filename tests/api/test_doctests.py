"""Every public function has an example, and each runs."""

from __future__ import annotations

import copy
import doctest
import inspect
from pathlib import Path
from typing import Any

import pytest

import compress
from compress import api

FUNCTIONS = [name for name in api.__all__ if inspect.isfunction(getattr(api, name))] + ["read_recipe", "run"]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_example_runs(name: str, model: Any, tokenizer: Any, texts: list[str], tmp_path: Path) -> None:
    names = {
        "compress": compress,
        "model": model,
        "teacher": copy.deepcopy(model),
        "tokenizer": tokenizer,
        "train": texts,
        "test": texts[:6],
        "directory": tmp_path,
    }
    function = getattr(compress, name)
    found = doctest.DocTestFinder(recurse=False).find(function, name, globs=names)
    assert sum(len(each.examples) for each in found) > 0, f"{name} has no example"
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for each in found:
        report: list[str] = []
        runner.run(each, out=report.append)
        assert not report, "".join(report)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_docstring_names_every_argument(name: str) -> None:
    function = getattr(compress, name)
    text = inspect.getdoc(function) or ""
    for section in ("Args:", "Returns:", "Raises:", "Examples:"):
        assert section in text, f"{name} has no {section}"
    for parameter in inspect.signature(function).parameters.values():
        stars = "**" if parameter.kind is parameter.VAR_KEYWORD else ""
        assert f"    {stars}{parameter.name}: " in text, f"{name} does not describe {parameter.name}"
