"""Checks of arguments that several functions take. Each error names the argument, its value and what is allowed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pydantic

from compress.errors import UserError
from compress.schema import Strict


def configured(kind: type[Strict], *, where: str = "", **values: Any) -> Any:
    """Build a config; the first thing that is wrong with it becomes one line that names the argument."""
    try:
        return kind(**values)
    except pydantic.ValidationError as error:
        found = error.errors()
        first = next((each for each in found if not each["type"].endswith("_type")), found[0])
        place = ".".join(part for part in map(str, first["loc"]) if part.isidentifier())
        given = "" if isinstance(first["input"], Mapping) or not place else f" (given: {first['input']!r})"
        text = first["msg"].removeprefix("Value error, ")
        raise UserError(": ".join(filter(None, [where, place, text])) + given) from None
