"""The base class of all models of recipes and of ``artifact.json``."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from compress.registry import suggest


def _listed(value: object) -> object:
    return (value,) if isinstance(value, str) else value


Name = TypeVar("Name", bound=str)
Several = Annotated[tuple[Name, ...], BeforeValidator(_listed), Field(min_length=1)]
"""One name, or a list of several."""


def added(default: Any) -> Any:
    """Return a field for a later version. Dumps omit it at its default value, so that old cache keys stay valid."""
    return Field(default, exclude_if=lambda value: value == default)


def fault(detail: Mapping[str, Any]) -> str:
    """Return the text of one of pydantic's error details: that of the exception of a validator, or pydantic's own."""
    raised = detail.get("ctx", {}).get("error")
    return str(raised) if isinstance(raised, Exception) else str(detail["msg"])


class Strict(BaseModel):
    """A frozen pydantic model that rejects unknown keys, NaN and infinity. Field docstrings become descriptions."""

    renamed: ClassVar[Mapping[str, str]] = {}
    """Old spellings and the new ones, of a field (``name``) or of one of its values (``name: value``). The error about
    an old spelling states the new one."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        known = {field.alias or name: field.annotation for name, field in cls.model_fields.items()}
        for key, given in value.items():
            if key not in known and key in cls.renamed:
                old = next(spelling for spelling in (f"{key}: {given}", key) if spelling in cls.renamed)
                text = f"{old} is now called {cls.renamed[old]}"
                raise PydanticCustomError("unknown_key", "{text}", {"text": text, "key": key})
            if key not in known:
                text = f"unknown key {key!r}. {suggest(key, known)}"
                raise PydanticCustomError("unknown_key", "{text}", {"text": text, "key": key})
            if isinstance(given, bool) and not {bool, Any} & _kinds(known[key]) and {int, float} & _kinds(known[key]):
                text = f"{key} is {str(given).lower()}; give a number"  # pydantic would read it as 0 or 1
                raise PydanticCustomError("unknown_key", "{text}", {"text": text, "key": key})
        return value


def _kinds(annotation: Any) -> set[Any]:
    """Return all types that occur in an annotation."""
    return {annotation}.union(*map(_kinds, get_args(annotation))) if _hashable(annotation) else set()


def _hashable(annotation: Any) -> bool:
    try:
        hash(annotation)
    except TypeError:
        return False
    return True
