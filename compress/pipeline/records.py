"""One record per artifact, joined from all that was measured of it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from compress.measure.measurement import Measurement

Plain = dict[tuple[str, ...], tuple[Measurement, Any]]
"""Which measurement got the plain names, and the split it was on: by type for a run, by type and artifact for each."""


def join(record: dict[str, Any], numbers: Mapping[str, Any], measurement: Measurement, plain: Plain) -> None:
    """Add what a measurement found to the record of an artifact; nothing that is there already is overwritten.

    All of it, numbers and conditions, is named in one way: plainly, or as ``perplexity (split eval)`` with what was
    measured otherwise than by the measurement that has the plain names. It is so named where the artifact has a plain
    number of the same name, and where the split is not the one that the run measured on first, be it of another
    artifact: figures of different splits never share a name.
    """
    mine = measurement, numbers.get("conditions", {}).get(measurement.type, {}).get("split")
    first, split = plain.setdefault((measurement.type,), mine)
    apart = mine[1] != split
    if not apart:
        first, _ = plain.setdefault((measurement.type, record["name"]), mine)
    groups = {place: values for place, values in numbers.items() if isinstance(values, dict)}
    taken = any(name in record.get(place, {}) for place, values in groups.items() for name in values)
    way = difference(first, measurement) if apart or taken else ""
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


def difference(first: Measurement, other: Measurement) -> str:
    """The settings of ``other`` that ``first`` has otherwise: ``split eval, batch 4``; empty where there are none.

    What they measure is no part of it, only how.
    """
    mine, theirs = (dict(_settings(each, {"type", "of", *other.names})) for each in (first, other))
    return ", ".join(f"{name.split('.')[-1]} {text}" for name, text in theirs.items() if mine.get(name) != text)


def _settings(given: BaseModel, left_out: Collection[str] = (), prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every setting with its text, those at their default too, which a dump may leave out."""
    for name in [name for name in type(given).model_fields if name not in left_out]:
        value = getattr(given, name)
        if isinstance(value, BaseModel):
            yield from _settings(value, prefix=f"{prefix}{name}.")
        else:
            listed = isinstance(value, list | tuple)
            text = " ".join(map(str, value)) if listed else "default" if value is None else str(value)
            yield prefix + name, text
