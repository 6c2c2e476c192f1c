"""Model families as tables, and everything that depends on how the stock library lays out, loads and caches a model."""

from typing import Any

from compress.errors import ModelError
from compress.models.families.bart import BART
from compress.models.families.gpt2 import GPT2
from compress.models.structure import ModelFamily

FAMILIES = (GPT2, BART)


def family_of(config: Any) -> ModelFamily:
    """The family of a stock config; raises ModelError as :func:`family_named` does."""
    return family_named(getattr(config, "model_type", None))


def family_named(model_type: str | None) -> ModelFamily:
    """The family of a ``model_type``; raises ModelError with those supported."""
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    known = ", ".join(name for family in FAMILIES for name in family.model_types)
    raise ModelError(f"model_type {model_type!r} is not supported; supported: {known}")


__all__ = ["FAMILIES", "family_named", "family_of"]
