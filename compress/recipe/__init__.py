"""The schema of a recipe and every check that needs no training."""

from compress.recipe.parse import read_recipe
from compress.recipe.recipe import ModelSpec, Recipe, TrainBpe

__all__ = ["ModelSpec", "Recipe", "TrainBpe", "read_recipe"]
