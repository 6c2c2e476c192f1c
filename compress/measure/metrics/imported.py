"""Metrics of the ``evaluate`` library: a script of the user, or one that ``evaluate`` holds in its cache.

A script is code, and loading it runs it. Only what a recipe or a call names is loaded. compress-lm downloads
nothing for it, but a script can.
"""

from __future__ import annotations

import ast
import atexit
import hashlib
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from compress.errors import DataError, RecipeError
from compress.measure.metrics.metric import Figure, Metric
from compress.measure.scores import is_number
from compress.problem import Problem
from compress.registry import suggest
from compress.schema import Strict


class Imported(Strict):
    """A metric of ``evaluate``, from a script or from the cache of that library. All numbers it returns are kept."""

    path: str | None = None
    """A Python file, relative to the recipe, with a subclass of ``evaluate.Metric``. ``check`` and ``run`` run it."""
    name: str | None = None
    """The name of a metric that ``evaluate.load`` has put into its cache. compress-lm does not download one."""
    figures: dict[str, Figure] = Field(default_factory=dict)
    """A dict from the key of a value to its label, direction and order."""

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.path is None) == (self.name is None):
            raise ValueError("give either path (a Python file) or name (of a metric in the cache of evaluate)")
        return self

    @property
    def called(self) -> str:
        """The name of the metric: that of its script, without the directory."""
        return Path(self.path).stem if self.path is not None else str(self.name).split("/")[-1]

    def script(self, base: Path) -> Path:
        """Return the script. A relative path starts from ``base``. Raises RecipeError if there is none."""
        if self.path is not None:
            found = base / Path(self.path).expanduser()
            if not found.is_file():
                raise RecipeError(_problem(f"there is no file {found}"))
            if found.suffix != ".py":
                raise RecipeError(_problem(f"{self.path!r} is not a script; the name of a script ends in .py"))
            return found
        if (cached := cached_script(str(self.name))) is None:
            raise RecipeError(_problem(f"{self.name!r} is unknown. {NOT_CACHED}"))
        return cached

    def content(self, base: Path) -> str:
        """Return SHA-256 of the script and of the files beside it that it imports."""
        sha = hashlib.sha256()
        for file in _files(self.script(base)):
            sha.update(file.read_bytes())
        return sha.hexdigest()

    def opened(self, base: Path) -> Metric:
        """Load the script. Raises RecipeError if it contains no metric of texts."""
        script, name, content = self.script(base), self.called, self.content(base)
        module = _load(script, content)
        several = _takes_several(module, name)
        signature = f"evaluate, {script.name} {content[:12]}"

        def scores(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Any]:
            rows = [list(row) for row in references] if several else _single(references, name)
            try:
                found = module.compute(predictions=list(texts), references=rows)
            except Exception as error:  # the script is code of the user
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                raise RecipeError(_problem(f"{script} fails ({reason})")) from error
            values = found if isinstance(found, Mapping) else {name: found}
            for key in self.figures:
                if not is_number(values.get(key)):
                    raise RecipeError(_problem(f"{name} gives no number {key!r}. {suggest(key, values)}"))
            return {**values, "signature": signature}

        return Metric(scores, self.figures)


def _problem(text: str) -> Problem:
    return Problem(("metric",), text)


NOT_CACHED = "A metric of evaluate has a name once evaluate.load has cached it; a script is given as {path: FILE}"


def cached_script(name: str) -> Path | None:
    """Return the newest script of a metric in the cache of ``evaluate``. None if there is none."""
    owner, _, stem = name.rpartition("/")
    folder = _modules() / "evaluate_modules" / "metrics" / f"{owner or 'evaluate-metric'}--{stem}"
    return max(folder.glob(f"*/{stem}.py"), key=lambda script: script.stat().st_mtime, default=None)


@cache
def _modules() -> Path:
    """Return the directory in which ``evaluate`` keeps scripts. Read before :func:`_cache` sets another one."""
    import evaluate

    return Path(evaluate.config.HF_MODULES_CACHE)


@lru_cache(maxsize=64)
def _load(script: Path, content: str) -> Any:
    """Return the module of a script. ``content`` is its hash, so that a changed script is loaded again."""
    import evaluate  # takes seconds

    tree = _parsed(script)
    if not any(isinstance(node, ast.ClassDef) for node in ast.walk(tree)):
        raise RecipeError(_problem(f"{script} contains no metric; it needs a subclass of evaluate.Metric"))
    try:
        return evaluate.load(str(script), keep_in_memory=True, cache_dir=_cache())
    except ImportError as error:
        raise RecipeError(_problem(f"{script} cannot be loaded: {error}")) from error


@cache
def _cache() -> str:
    """Return a directory for the modules that ``evaluate`` copies and imports. It is removed when the process ends.

    The setting does not change if a module was loaded before, because Python then imports ``evaluate_modules`` from
    another directory already.
    """
    import evaluate

    _modules()
    directory = tempfile.mkdtemp(prefix="compress-metrics-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    if "evaluate_modules" not in sys.modules:
        evaluate.config.HF_MODULES_CACHE = directory
    return directory


def _files(script: Path) -> Iterator[Path]:
    """Yield the script, and the files beside it that ``evaluate`` copies with it: those of ``from .name import``."""
    yield script
    names = {
        (node.module or alias.name).split(".")[0]
        for node in ast.walk(_parsed(script))
        if isinstance(node, ast.ImportFrom) and node.level == 1
        for alias in node.names
    }
    yield from (file for name in sorted(names) if (file := script.with_name(f"{name}.py")).is_file())


def _parsed(script: Path) -> ast.Module:
    try:
        return ast.parse(script.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError) as error:
        raise RecipeError(_problem(f"{script} is not Python: {error}")) from None


def _takes_several(module: Any, name: str) -> bool:
    """Return whether a metric accepts several references per text. Raises RecipeError if it does not compare texts."""
    kinds = module.features if isinstance(module.features, list) else [module.features]
    of_texts = [
        kind
        for kind in kinds
        if set(kind) == {"predictions", "references"}
        and getattr(kind["predictions"], "dtype", "") == "string"
        and getattr(_inner(kind["references"]), "dtype", "") == "string"
    ]
    if not of_texts:
        given = " or ".join(str(dict(kind)) for kind in kinds)
        raise RecipeError(_problem(f"{name} does not compare texts with references; it takes {given}"))
    return any(kind["references"] is not _inner(kind["references"]) for kind in of_texts)


def _inner(kind: Any) -> Any:
    """Return the element type of a list of ``datasets`` features, or the feature itself."""
    return getattr(kind, "feature", kind)


def _single(references: Sequence[Sequence[str]], name: str) -> list[str]:
    if (most := max(map(len, references), default=0)) > 1:
        raise DataError(_problem(f"{name} compares a text with one reference, but some rows have {most}"))
    return [row[0] for row in references]
