"""The directory of a run: results under their keys, partial ones beside them, and the run's own records."""

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
    """The place of one result: ``02-pruned-1b6f9d95d713``, and the name it has until it is whole."""

    workdir: Path
    index: int
    name: str
    key: str
    proof: str = MANIFEST
    """The file without which a directory is no result."""

    @property
    def found(self) -> Path | None:
        """The finished result with this key, under whatever number and name it was made."""
        return next((path for path in self._named() if (path / self.proof).is_file()), None)

    @property
    def unproven(self) -> Path | None:
        """What has the name of a result and is none."""
        return next((path for path in self._named() if not (path / self.proof).is_file()), None)

    @property
    def partial(self) -> Path:
        """Where the result is made: what an interrupted run left there, or a directory yet to be made."""
        begun = next(iter(sorted(self.workdir.glob(f"[0-9]*-{self.key}{PARTIAL}"))), None)
        return begun or self.final.with_name(self.final.name + PARTIAL)

    @property
    def final(self) -> Path:
        """Where the result goes once it is whole."""
        return self.workdir / f"{self.index:02d}-{self.name}-{self.key}"

    def _named(self) -> list[Path]:
        return [path for path in sorted(self.workdir.glob(f"[0-9]*-{self.key}")) if path.is_dir()]


def require_no_file(workdir: Path) -> None:
    """Refuse a file where the work directory is or will be."""
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir {workdir}: is a file, not a directory")


@contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Create ``workdir`` and hold it against a second run; the main process does so for all of this one."""
    if not processes.is_main():
        yield
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError as error:  # where no directory can be made, or the current one is gone
        raise UserError(f"--workdir {workdir}: {error.strerror}") from None
    with (workdir / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--workdir {workdir}: another run is at work there") from None
        yield


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The value in ``path``, or None where there is no such file or none that is whole."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except ValueError:
        return None


def shown_path(path: Path, workdir: Path) -> str:
    """``path`` relative to the work directory where it lies inside, else as it is."""
    return os.fspath(path.relative_to(workdir) if path.is_relative_to(workdir) else path)
