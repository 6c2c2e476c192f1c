"""The training curves of a stage, which reports draw."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class History:
    """Training curves as JSON lines; those past ``keep_until``, the checkpoint resumed from, are dropped."""

    def __init__(self, path: Path, keep_until: int) -> None:
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        whole = [line for line in lines if line.endswith("\n")]  # a run that was killed may leave half of one
        path.write_text("".join(line for line in whole if json.loads(line)["step"] <= keep_until))
        self.path = path

    def write(self, **values: Any) -> None:
        """Append one line."""
        with self.path.open("a") as file:
            file.write(json.dumps(values) + "\n")
