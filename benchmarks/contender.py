"""What is timed against others: files on disk, a pass over a workload, and a fresh process for load time and memory."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compress.errors import CompressError, UserError
from compress.measure.workload import Times, Workload

Run = Callable[[Workload], Times]


class Skipped(Exception):
    """A peer that is not here, or cannot take this model: its name, and why."""


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
    script = f"import fresh, {module}; fresh.tell({module}.opener)"
    command = [sys.executable, "-c", script, json.dumps(vars(work)), *map(str, arguments)]
    paths = os.pathsep.join(filter(None, [str(here), *sys.path]))
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CompressError(f"{module}: a fresh process failed ({done.stderr.strip().splitlines()[-1:]})")
    found: dict[str, float | int] = json.loads(done.stdout.splitlines()[-1])
    return found


def finished(directory: Path, make: Callable[[Path], Mapping[str, Any]]) -> dict[str, Any]:
    """Make a directory once: what ``make`` tells of it is kept in ``made.json``, which is written last."""
    note = directory / "made.json"
    if not note.exists():
        directory.mkdir(parents=True, exist_ok=True)
        print(f"making {directory.name}", file=sys.stderr, flush=True)
        note.write_text(json.dumps(make(directory)))
    found: dict[str, Any] = json.loads(note.read_text())
    return found


def chosen(text: str, known: Iterable[str]) -> tuple[str, ...]:
    """The peers that an option names: all, none, or names with commas between them."""
    known = tuple(known)
    if text in ("all", "none"):
        return known if text == "all" else ()
    names = tuple(text.split(","))
    if unknown := next((name for name in names if name not in known), None):
        raise UserError(f"--peers: {unknown!r} is unknown; allowed: all, none, or {','.join(known)}")
    return names
