"""The base of everything a user can write in a recipe or find in ``artifact.json``."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

from compress.registry import suggest


class Strict(BaseModel):
    """A frozen pydantic model that rejects unknown keys, NaN and infinity; a field's docstring is its description."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, value: Any) -> Any:
        known = [field.alias or name for name, field in cls.model_fields.items()]
        unknown = [key for key in value if key not in known] if isinstance(value, Mapping) else []
        if unknown:
            text = f"unknown key {unknown[0]!r}. {suggest(unknown[0], known)}"
            raise PydanticCustomError("unknown_key", "{text}", {"text": text, "key": unknown[0]})
        return value
