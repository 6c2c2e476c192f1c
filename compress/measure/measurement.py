"""The base class of measurements: a frozen config with a ``run`` method from artifacts to numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, PrivateAttr
from rich.console import Console

from compress.artifact import Artifact
from compress.data import Data
from compress.errors import RecipeError
from compress.problem import Problem
from compress.registry import suggest
from compress.schema import Strict


def _names(value: object) -> object:
    return (value,) if isinstance(value, str) and value != "all" else value


def _some(value: Literal["all"] | tuple[str, ...]) -> Literal["all"] | tuple[str, ...]:
    if not value:
        raise ValueError("name at least one artifact, or write all")
    return value


class Measurement(Strict):
    """One measurement of a recipe. Subclasses add fields and ``run``, which never writes into an artifact."""

    type: str
    of: Annotated[Literal["all"] | tuple[str, ...], BeforeValidator(_names), AfterValidator(_some)] = "all"
    """Names of the artifacts to measure: one name, a list, or all."""

    needs_data: ClassVar[bool] = False
    """Whether the measurement reads ``data.test``, or ``data.eval`` if there is no test split."""
    names: ClassVar[frozenset[str]] = frozenset()
    """Fields that define what is measured. The other fields define how."""
    version: ClassVar[int] = 1
    """Part of the cache key of results. Increase it when the numbers change."""

    _base: Path = PrivateAttr(Path())

    @property
    def recipe_directory(self) -> Path:
        """The directory that relative paths start from: that of the recipe file, or the current one."""
        return self._base

    def written_in(self, base: Path) -> None:
        """Record the directory that relative paths start from."""
        self._base = base

    @property
    def depends_on(self) -> dict[str, str]:
        """Versions and hashes of what else determines the numbers, such as a script. Part of the cache key."""
        return {}

    @property
    def unread(self) -> frozenset[str]:
        """Fields without effect on these numbers, such as how text is generated where none is."""
        return frozenset()

    @property
    def compared_with(self) -> tuple[str, ...]:
        """Names of artifacts, besides ``of``, on which the numbers depend."""
        return ()

    def run(
        self, artifacts: Mapping[str, Artifact], *, data: Data | None, device: str, console: Console | None
    ) -> dict[str, dict[str, Any]]:
        """Measure, and return for each measured name the values to add to its record.

        Args:
            artifacts: every artifact of the run in its order, the base model first. ``of`` selects from them.
            data: the run's data, if it has any.
            device: the device of torch models.
            console: shows progress; None for no progress.
        """
        raise NotImplementedError

    def problems(self, configs: Mapping[str, Any], data: Data | None) -> Iterator[Problem]:
        """Yield problems that can be found before any work. Paths start at a field of this measurement.

        Args:
            configs: a dict from the name of each measured model to its transformers config.
            data: the run's data as these models read it.
        """
        return iter(())

    def chosen(self, artifacts: Mapping[str, Artifact]) -> dict[str, Artifact]:
        """Return the artifacts that ``of`` names, in the order of ``of``."""
        if self.of == "all":
            return dict(artifacts)
        for name in self.of:
            if name not in artifacts:
                text = f"{name!r} is unknown. {suggest(name, artifacts)}"
                raise RecipeError(Problem((self.type, "of"), text))
        return {name: artifacts[name] for name in self.of}
