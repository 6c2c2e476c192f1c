"""Compress a GPT-2, BART or Llama: prune, distil, quantize and export, from Python or from a recipe.

Importing this package imports nothing else: the names below are loaded when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from compress import plots
    from compress.api import (
        Masks,
        Records,
        benchmark,
        distill,
        drop_layers,
        evaluate,
        export_onnx,
        finetune,
        learn_masks,
        load,
        prune,
        quantize_,
        save,
        score,
    )
    from compress.artifact import Artifact
    from compress.pipeline import run
    from compress.recipe import Recipe, read_recipe

__all__ = [
    "Artifact",
    "Masks",
    "Recipe",
    "Records",
    "__version__",
    "benchmark",
    "distill",
    "drop_layers",
    "evaluate",
    "export_onnx",
    "finetune",
    "learn_masks",
    "load",
    "plots",
    "prune",
    "quantize_",
    "read_recipe",
    "run",
    "save",
    "score",
]
__version__ = "0.2.0"

_HOMES = dict.fromkeys(__all__, "compress.api") | {
    "Artifact": "compress.artifact",
    "Recipe": "compress.recipe",
    "read_recipe": "compress.recipe",
    "run": "compress.pipeline",
}


def __getattr__(name: str) -> object:
    if name == "plots":
        return import_module("compress.plots")
    if name not in _HOMES or name == "__version__":
        raise AttributeError(f"module 'compress' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
