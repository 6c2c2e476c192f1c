"""The directory of a run: finished results by key, partial results beside them, and the records of the run."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.artifact import MANIFEST
from compress.distributed import processes
from compress.errors import UserError
from compress.files import PARTIAL, write_text


@dataclass(frozen=True)
class Slot:
    """The place of one result, such as ``02-pruned-1b6f9d95d713``, and its name while it is incomplete."""

    workdir: Path
    index: int
    name: str
    key: str
    proof: str = MANIFEST
    """The file that marks a directory as a finished result."""

    @property
    def found(self) -> Path | None:
        """The finished result with this key, whatever its number and name."""
        return next((path for path in self._named() if (path / self.proof).is_file()), None)

    @property
    def unproven(self) -> Path | None:
        """A directory that has the name of a result but is not one."""
        return next((path for path in self._named() if not (path / self.proof).is_file()), None)

    @property
    def partial(self) -> Path:
        """The directory in which the result is made. It may not exist yet, or hold the work of an interrupted run."""
        begun = next(iter(sorted(self.workdir.glob(f"[0-9]*-{self.key}{PARTIAL}"))), None)
        return begun or self.final.with_name(self.final.name + PARTIAL)

    @property
    def final(self) -> Path:
        """The directory of the finished result."""
        return self.workdir / f"{self.index:02d}-{self.name}-{self.key}"

    def _named(self) -> list[Path]:
        return [path for path in sorted(self.workdir.glob(f"[0-9]*-{self.key}")) if path.is_dir()]


def require_no_file(workdir: Path) -> None:
    """Raise an error if the path of the work directory is a file."""
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir {workdir}: is a file, not a directory")


@contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Create ``workdir`` and lock it against a second run. The main process does this for all processes."""
    if not processes.is_main():
        yield
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError as error:  # the directory cannot be made, or the current one was deleted
        raise UserError(f"--workdir {workdir}: {error.strerror}") from None
    with (workdir / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--workdir {workdir}: another run is using it") from None
        yield


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Return the value in ``path``, or None if the file is missing or incomplete."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except ValueError:
        return None


def shown_path(path: Path, workdir: Path) -> str:
    """``path`` relative to the work directory if it is inside, otherwise unchanged."""
    return os.fspath(path.relative_to(workdir) if path.is_relative_to(workdir) else path)
