"""Join all measurements of an artifact into one record."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from compress.measure.measurement import Measurement

Plain = dict[tuple[str, ...], tuple[Measurement, Any]]
"""The measurement with plain names, and its split. Keys are its type (for the run), or its type and an artifact."""


def join(record: dict[str, Any], numbers: Mapping[str, Any], measurement: Measurement, plain: Plain) -> None:
    """Add the numbers of a measurement to the record of an artifact. Existing entries are never overwritten.

    All numbers and conditions of one measurement get the same kind of name: a plain one, or one such as
    ``perplexity (split eval)`` with the settings that differ from the measurement with plain names. The longer name is
    used if the artifact already has a plain number of this name, or if the split is not the first one that the run
    measured on, for this or any other artifact. So values of different splits never have the same name.
    """
    mine = measurement, numbers.get("conditions", {}).get(measurement.type, {}).get("split")
    first, split = plain.setdefault((measurement.type,), mine)
    apart = mine[1] != split
    if not apart:
        first, _ = plain.setdefault((measurement.type, record["name"]), mine)
    groups = {place: values for place, values in numbers.items() if isinstance(values, dict)}
    taken = {place for place, values in groups.items() for name in values if name in record.get(place, {})}
    way = ""
    if apart or taken - {"conditions"}:
        way = difference(first, measurement)
    elif taken:  # the numbers have names of their own, so only settings that both measurements read can differ
        way = difference(first, measurement, first.unread)
    named = {
        place: {f"{name} ({way})" if way else name: value for name, value in values.items()}
        for place, values in groups.items()
    }
    _merge(record, {**numbers, **named})


def _merge(there: dict[str, Any], values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if isinstance(value, dict):
            _merge(there.setdefault(name, {}), value)
        else:
            there.setdefault(name, value)


def difference(first: Measurement, other: Measurement, left_out: Collection[str] = ()) -> str:
    """Return the settings of ``other`` that differ from ``first``, such as ``split eval, batch 4``, or an empty text.

    Only settings that say how to measure are compared, not those that say what is measured, and not those that
    ``other`` does not read. ``left_out`` names further settings.
    """
    without = {"type", "of", *other.names, *other.unread, *left_out}
    mine, theirs = (dict(_settings(each, without)) for each in (first, other))
    return ", ".join(f"{name.split('.')[-1]} {text}" for name, text in theirs.items() if mine.get(name) != text)


def _settings(given: BaseModel, left_out: Collection[str] = (), prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield every setting with its text. This includes defaults, which a dump may leave out."""
    for name in [name for name in type(given).model_fields if name not in left_out]:
        value = getattr(given, name)
        if isinstance(value, BaseModel):
            yield from _settings(value, prefix=f"{prefix}{name}.")
        else:
            listed = isinstance(value, list | tuple)
            text = " ".join(map(str, value)) if listed else "default" if value is None else str(value)
            yield prefix + name, text
