"""What is wrong with a value, and where that value is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Location = tuple[str | int, ...]
"""The path to a value: names of fields, and numbers of list items."""


@dataclass(frozen=True)
class Problem:
    """What is wrong with the value at ``path``. Whoever holds that value puts its own path before it."""

    path: Location
    """Relative to the object that reports the problem. It is empty for the object as a whole."""
    text: str
    """A clause that does not repeat the path."""

    def inside(self, *path: str | int) -> Problem:
        """Return the same problem as the owner of the object at ``path`` reports it."""
        return Problem((*path, *self.path), self.text)

    def __str__(self) -> str:
        return f"{show(self.path)}: {self.text}" if self.path else self.text


def show(location: Sequence[str | int]) -> str:
    """Return a location in the notation of users: ``("stages", 1, "train")`` -> ``stages[1].train``."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")
