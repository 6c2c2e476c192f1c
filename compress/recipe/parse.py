"""Read a recipe from a file."""

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

    Args:
        path: a YAML file.
        settings: values that replace those in the file, such as ``stages.small.train.steps=10``.

    Returns:
        The recipe; it is frozen.

    Raises:
        RecipeError: the recipe cannot run. One line names the file and its line, the field, its value and what is
            allowed.
        UserError: an argument has the wrong type, or the file cannot be read.

    Examples:
        >>> stages = "[{type: learn_masks, method: magnitude}, {type: prune, name: half, keep: 2/4}]"
        >>> text = "{version: 1, name: small, models: {base: gpt2}, stages: " + stages + "}"
        >>> (directory / "recipe.yaml").write_text(text) > 0
        True
        >>> compress.read_recipe(directory / "recipe.yaml", ["seed=3"]).seed
        3
    """
    if not isinstance(path, str | os.PathLike):
        raise RecipeError(f"path: expected the path of a recipe such as 'recipe.yaml', got {type(path).__name__}")
    listed = isinstance(settings, Sequence) and not isinstance(settings, str)
    if not listed or not all(isinstance(setting, str) for setting in settings):
        raise RecipeError(f"settings: expected a list of strings such as ['seed=1'], got {settings!r}")
    document = override(read_document(Path(path)), settings)
    if not isinstance(document.data, Mapping):
        raise RecipeError(f"{document.where(())}: a recipe is a mapping (key: value) that starts with 'version: 1'")
    try:
        recipe = Recipe.model_validate(document.data)
    except ValidationError as error:
        raise RecipeError(explain(error, document)) from None
    recipe.written_in(document, Path(path).parent)
    return recipe
