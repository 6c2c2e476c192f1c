"""Turn a pydantic error into one line: file and line, path to the field, value, and what is allowed."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from compress.problem import Location, Problem, show
from compress.recipe.document import Document
from compress.schema import fault

_LONGEST_VALUE = 60
_KINDS = dict.fromkeys(("dict_type", "model_type", "model_attributes_type"), "it should be a mapping (key: value)") | (
    dict.fromkeys(("list_type", "tuple_type"), "it should be a list")
)
"""What a value of the wrong kind should be, by the name of pydantic's error."""


def explain(error: ValidationError, document: Document) -> str:
    """Return the first problem in one line, and the number of further problems."""
    found: dict[Location, list[Mapping[str, Any]]] = {}
    for detail in error.errors(include_url=False):
        found.setdefault(written(detail["loc"], document.data, detail["type"] == "missing"), []).append(detail)
    for location in [at for at in found if any(len(other) > len(at) and other[: len(at)] == at for other in found)]:
        del found[location]  # another member of the union matched more of the value
    location, details = next(iter(found.items()))
    details = [detail for detail in details if not detail["type"].endswith("_type")] or details
    text = " or ".join(dict.fromkeys(_text(location, detail) for detail in details))
    rest = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    line = location + tuple(details[0].get("ctx", {}).get("key", "").splitlines())
    return f"{document.where(line)}: {text}{rest}"


def written(location: Location, data: Any, missing: bool = False) -> Location:
    """``location`` as the user wrote it: with the short form ``model``, without the parts pydantic adds for unions."""
    if location[:2] == ("models", "base") and "model" in data:
        location = ("model", *location[2:])
    kept: list[str | int] = []
    for position, part in enumerate(location):
        if isinstance(data, Mapping) and part in data:
            data = data[str(part)]
        elif isinstance(data, list) and isinstance(part, int) and part < len(data):
            data = data[part]
        elif not (missing and position == len(location) - 1):
            continue
        kept.append(part)
    return tuple(kept)


def _text(location: Location, detail: Mapping[str, Any]) -> str:
    kind, at = detail["type"], show(location)
    if kind == "recipe":
        return str(detail["msg"])
    if kind == "missing":
        return f"{at} is missing"
    if kind in ("unknown_type", "unknown_key", "no_type") or isinstance(detail["input"], Mapping) or not at:
        return str(Problem(location, _reason(detail)))
    return f"{at} is {_short(detail['input'])}: {_reason(detail)}"


def _reason(detail: Mapping[str, Any]) -> str:
    reason = _KINDS.get(detail["type"]) or fault(detail).replace("Input should be", "it should be")
    allowed = re.findall(r"'([^']*)'", str(detail.get("ctx", {}).get("expected", "")))
    near = difflib.get_close_matches(str(detail["input"]), allowed, n=1)
    return f"{reason}. Did you mean {near[0]!r}?" if near else reason


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else text[:_LONGEST_VALUE] + "..."
