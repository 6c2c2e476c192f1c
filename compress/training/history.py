"""The training curves of a stage, which reports draw."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from compress.files import write_text


class History:
    """Training curves as JSON lines. Lines past ``keep_until``, the checkpoint resumed from, are dropped.

    Without a path the lines are only kept in memory, in ``rows``.
    """

    def __init__(self, path: Path | None, keep_until: int) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        if path is None:
            return
        lines = path.read_text(errors="replace").splitlines(keepends=True) if path.exists() else []
        write_text(path, "".join(line for line in lines if _within(line, keep_until)))

    def write(self, **values: Any) -> None:
        """Append one line."""
        self.rows.append(values)
        if self.path is None:
            return
        with self.path.open("a") as file:
            file.write(json.dumps(values) + "\n")


def _within(line: str, step: int) -> bool:
    """Return whether a line is complete and its step is at most ``step``. A killed process may leave half a line."""
    try:
        return bool(line.endswith("\n") and json.loads(line)["step"] <= step)
    except (ValueError, TypeError, KeyError):
        return False
