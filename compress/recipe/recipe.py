"""The schema of a recipe. Reading one builds every stage, term and measurement, so wrong values are found at once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PrivateAttr,
    SerializeAsAny,
    ValidationError,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from compress.data import DataSpec
from compress.errors import RecipeError
from compress.measure.measurement import Measurement
from compress.problem import Problem
from compress.recipe.document import Document
from compress.recipe.explain import written
from compress.recipe.references import NAME, NAME_RULE, stage_names, static_problems
from compress.registry import MEASUREMENTS, STAGES
from compress.schema import Strict
from compress.stages.stage import Stage


def _named(value: str) -> str:
    if not NAME.fullmatch(value):
        raise ValueError(NAME_RULE)
    return value


Name = Annotated[str, AfterValidator(_named)]


class TrainBpe(Strict):
    """A byte-level BPE tokenizer trained on the text of ``data.train``."""

    train_bpe: int = Field(ge=257)
    """Size of the vocabulary: 256 bytes, the special tokens and the merges."""


class ModelSpec(Strict):
    """A model to start from: an existing one, or a new one with random weights."""

    path: str | None = None
    """A directory (relative to the recipe) or a hub id."""
    config: dict[str, Any] | str | None = None
    """A transformers config, or a JSON file with one, for a model with random weights."""
    tokenizer: str | TrainBpe | None = None
    """With ``config``: the directory of a tokenizer, or ``{train_bpe: N}``; none for data of token ids."""

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.path is None) == (self.config is None):
            raise ValueError("give either path (a directory or a hub id) or config (random weights)")
        if self.path is not None and self.tokenizer is not None:
            raise ValueError("tokenizer applies only to config; a model with a path has its own tokenizer")
        return self


AnyStage = Annotated[SerializeAsAny[Stage], BeforeValidator(STAGES.read), STAGES]
AnyMeasurement = Annotated[SerializeAsAny[Measurement], BeforeValidator(MEASUREMENTS.read), MEASUREMENTS]


class Recipe(Strict):
    """Models, data, stages and measurements, frozen. Its names, ranges, order and references have been checked.

    ``model: X`` is short for ``models: {base: X}``, and a model given as text is short for ``{path: text}``.
    A stage starts from the stage before it (the first from the first model) unless ``source`` names another.
    """

    version: Literal[1]
    name: Name
    seed: int = Field(0, ge=0, lt=2**32)
    models: dict[Name, ModelSpec] = Field(min_length=1)
    data: DataSpec | None = None
    stages: tuple[AnyStage, ...] = ()
    measure: tuple[AnyMeasurement, ...] = ()

    _document: Document | None = PrivateAttr(None)
    _base: Path = PrivateAttr(Path())

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        if not isinstance(value, Mapping) or "model" not in value:
            return value
        if "models" in value:
            raise PydanticCustomError("recipe", "model is short for models: {base: ...}; give one of the two")
        rest = {key: item for key, item in value.items() if key != "model"}
        return {**rest, "models": {"base": value["model"]}}

    @model_validator(mode="after")
    def _references(self) -> Self:
        traits: dict[str, frozenset[str]] = dict.fromkeys(self.models, frozenset())
        unopened = [name for name, spec in self.models.items() if spec.path is not None]
        problems = [
            InitErrorDetails(
                type=PydanticCustomError("recipe", "{text}", {"text": str(problem)}), loc=problem.path, input=None
            )
            for problem in static_problems(traits, self.stages, self.measure, unopened)
        ]
        if problems:
            raise ValidationError.from_exception_data("Recipe", problems)
        return self

    @property
    def base(self) -> Path:
        """The directory that relative paths start from: that of the recipe file, or the current one."""
        return self._base

    @property
    def stage_names(self) -> list[str]:
        """The name of each stage's result: its ``name``, or its type if it has none."""
        return stage_names(self.stages)

    def plain(self) -> dict[str, Any]:
        """Return the recipe as plain data: as written in its file, or only the fields that were given."""
        return self._document.data if self._document else self.model_dump(mode="json", exclude_unset=True)

    def written_in(self, document: Document, base: Path) -> None:
        """Record where the recipe was read from, so that later errors can name file and line."""
        self._document, self._base = document, base
        for measurement in self.measure:
            measurement.written_in(base)

    def error(self, problem: Problem) -> RecipeError:
        """Return the error for a problem with this recipe. It starts with file and line if the recipe has a file."""
        if self._document is None:
            return RecipeError(problem)
        return RecipeError(f"{self._document.where(written(problem.path, self._document.data))}: {problem}")
