"""Compress a GPT-2 or BART with a recipe of stages: prune, distil, quantize, export, with the proof beside the model.

Importing this package imports nothing else: the names below are loaded when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from compress.artifact import Artifact, load
    from compress.pipeline import run
    from compress.recipe import Recipe, read_recipe

__all__ = ["Artifact", "Recipe", "__version__", "load", "read_recipe", "run"]
__version__ = "0.1.0"

_HOMES = {
    "Artifact": "compress.artifact",
    "Recipe": "compress.recipe",
    "load": "compress.artifact",
    "read_recipe": "compress.recipe",
    "run": "compress.pipeline",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'compress' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
