"""What is timed against others: files on disk, a pass over a workload, and a fresh process for load time and memory."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import compress
from compress.errors import CompressError, UserError
from compress.measure.workload import Times, Workload

Run = Callable[[Workload], Times]

SOURCES = ("functional", "models", "onnx", "surgery")
"""Parts of the package that decide what a model or a graph made here is."""


class Skipped(Exception):
    """A peer that is not installed or does not support this model: its name, and the reason."""


@dataclass(frozen=True)
class Contender:
    """``step_bytes`` are the weights that a token reads (None: not counted), ``facts`` what else is reported."""

    name: str
    files: tuple[Path, ...]
    open: Callable[[], Run]
    fresh: Callable[[Workload], Mapping[str, float | int]]
    step_bytes: Callable[[], int] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Of the model files that are opened."""
        return sum(file.stat().st_size for file in self.files)


def fresh_process(module: str, work: Workload, *arguments: object) -> dict[str, float | int]:
    """``load_s`` and ``peak_rss_bytes`` of a process that imports a module of this folder, opens and decodes once.

    ``module.opener(*arguments)`` gives a Run; as in ``compress.measure.peak``, the clock starts after the imports.
    """
    here = Path(__file__).parent
    script = f"import fresh, {module}; fresh.report({module}.opener)"
    command = [sys.executable, "-c", script, json.dumps(vars(work)), *map(str, arguments)]
    paths = os.pathsep.join(filter(None, [str(here), *sys.path]))
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CompressError(f"{module}: a fresh process failed ({done.stderr.strip().splitlines()[-1:]})")
    found: dict[str, float | int] = json.loads(done.stdout.splitlines()[-1])
    return found


def finished(directory: Path, make: Callable[[Path], Mapping[str, Any]]) -> dict[str, Any]:
    """Make a directory once, and again if other code made it. The facts of ``make`` are kept in ``made.json``.

    The note is written last, and holds the digest of the code beside the facts.
    """
    note, code = directory / "made.json", made_by(make)
    if note.exists() and json.loads(note.read_text()).get("made_by") != code:
        print(f"{directory.name} was made by other code and is made again", file=sys.stderr, flush=True)
        shutil.rmtree(directory)
    if not note.exists():
        directory.mkdir(parents=True, exist_ok=True)
        print(f"making {directory.name}", file=sys.stderr, flush=True)
        note.write_text(json.dumps({"made_by": code, "facts": make(directory)}))
    found: dict[str, Any] = json.loads(note.read_text())["facts"]
    return found


def made_by(make: Callable[[Path], Mapping[str, Any]]) -> str:
    """The package's version, and a digest of the sources that models and graphs come from, the file of ``make`` too."""
    package, here = Path(compress.__file__).parent, Path(__file__).parent
    function: Any = make.func if isinstance(make, partial) else make
    sources = [file for part in SOURCES for file in sorted((package / part).rglob("*.py"))]
    digest = hashlib.sha256()
    for file in (*sources, here / "own_models.py", Path(function.__code__.co_filename)):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return f"{compress.__version__} {digest.hexdigest()[:16]}"


def chosen(text: str, known: Iterable[str]) -> tuple[str, ...]:
    """The peers that an option names: all, none, or names with commas between them."""
    known = tuple(known)
    if text in ("all", "none"):
        return known if text == "all" else ()
    names = tuple(text.split(","))
    if unknown := next((name for name in names if name not in known), None):
        raise UserError(f"--peers: {unknown!r} is unknown; allowed: all, none, or {','.join(known)}")
    return names
