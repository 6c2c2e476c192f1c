"""Reads a recipe from a file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import ValidationError

from compress.errors import RecipeError
from compress.recipe.document import override, read_document
from compress.recipe.explain import explain
from compress.recipe.recipe import Recipe


def read_recipe(path: str | Path, settings: Sequence[str] = ()) -> Recipe:
    """Read a recipe and check everything that needs no model and no data.

    ``settings`` are overrides such as ``stages.small.train.steps=10``. Raises :class:`RecipeError` in one line with
    file and line, the path to the field, its value and what would be allowed.
    """
    if not isinstance(path, str | os.PathLike):
        raise RecipeError(f"path: a {type(path).__name__} is not the path of a recipe; give one such as 'recipe.yaml'")
    listed = isinstance(settings, Sequence) and not isinstance(settings, str)
    if not listed or not all(isinstance(setting, str) for setting in settings):
        raise RecipeError(f"settings: {settings!r} is no list of settings; give texts such as 'seed=1'")
    document = override(read_document(Path(path)), settings)
    if not isinstance(document.data, Mapping):
        raise RecipeError(f"{document.where(())}: a recipe is a mapping (key: value) that starts with 'version: 1'")
    try:
        recipe = Recipe.model_validate(document.data)
    except ValidationError as error:
        raise RecipeError(explain(error, document)) from None
    recipe.written_in(document, Path(path).parent)
    return recipe
