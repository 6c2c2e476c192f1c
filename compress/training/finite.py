"""Stop a run whose numbers are no longer finite, with the last good checkpoint in the message."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from compress.errors import DivergedError


@dataclass(frozen=True)
class Guard:
    """Checks the numbers of the run ``name``, whose peak learning rate is ``lr``."""

    name: str
    lr: float
    latest: Callable[[], Path | None]
    """Gives the newest checkpoint."""

    def require(self, what: str, value: float, step: int, *, term: str = "") -> None:
        """Raise DivergedError before step ``step`` is kept if its value is NaN or infinite."""
        if math.isfinite(value):
            return
        last = self.latest()
        where = f"the last good checkpoint is {last}" if last else "no checkpoint was written before"
        raise DivergedError(
            f"{self.name}: {what} is {value} at step {step}"
            f"{f' (term {term})' if term else ''}; {where}; try a lower lr than {self.lr:g}"
        )
