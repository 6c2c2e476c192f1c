"""The training curves of a stage, which reports draw."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from compress.files import write_text


class History:
    """Training curves as JSON lines; those past ``keep_until``, the checkpoint resumed from, are dropped."""

    def __init__(self, path: Path, keep_until: int) -> None:
        lines = path.read_text(errors="replace").splitlines(keepends=True) if path.exists() else []
        write_text(path, "".join(line for line in lines if _within(line, keep_until)))
        self.path = path

    def write(self, **values: Any) -> None:
        """Append one line."""
        with self.path.open("a") as file:
            file.write(json.dumps(values) + "\n")


def _within(line: str, step: int) -> bool:
    """Whether a line is of a step up to ``step``, and whole: a kill leaves half of one, a loss of power garbage."""
    try:
        return bool(line.endswith("\n") and json.loads(line)["step"] <= step)
    except (ValueError, TypeError, KeyError):
        return False
