"""Model families as tables, and everything that depends on how transformers lays out, loads and caches a model."""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points
from typing import Any

from compress.errors import ModelError
from compress.models.families import BUILT_IN
from compress.models.family import ModelFamily

GROUP = "compress.families"
"""Entry-point group in which other distributions register a ``ModelFamily``."""


@cache
def families() -> tuple[ModelFamily, ...]:
    """Return every known family: the built-in ones, then those of other distributions by name."""
    others = sorted(entry_points(group=GROUP), key=lambda point: point.name)
    return (*BUILT_IN, *(point.load() for point in others))


def family_of(config: Any) -> ModelFamily:
    """Return the family of a transformers config. Raises ModelError as :func:`family_named` does."""
    return family_named(getattr(config, "model_type", None))


def family_named(model_type: str | None) -> ModelFamily:
    """Return the family of a ``model_type``. Raises ModelError, listing the supported types, for any other."""
    for family in families():
        if model_type in family.model_types:
            return family
    known = ", ".join(name for family in families() for name in family.model_types)
    raise ModelError(f"model_type {model_type!r} is not supported; supported: {known}")


def context_of(config: Any) -> int:
    """Return the maximum number of tokens per row for a model with this transformers config."""
    return family_of(config).positions(config)


__all__ = ["ModelFamily", "context_of", "families", "family_named", "family_of"]
