"""One record per artifact, joined from all that was measured of it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from compress.measure.measurement import Measurement

Found = dict[tuple[str, str], tuple[Measurement, Any]]
"""For each number of a run, by place and name: the measurement that found it first, and the split it was found on."""


def join(
    record: dict[str, Any], numbers: Mapping[str, Any], first: Measurement, measurement: Measurement, found: Found
) -> None:
    """Add what a measurement found to the record of an artifact; nothing that is there already is overwritten.

    ``first`` is the first measurement of this type that was taken of the artifact. Where a later one found a number of
    the same name, both stay: the later as ``perplexity (split eval)``, its name with what was measured otherwise. Its
    conditions stand beside those of the first in the same way. A number that the run found on other data first, be it
    of another artifact, is named so too: figures of different data never share a name.
    """
    split = numbers.get("conditions", {}).get(measurement.type, {}).get("split")
    for place, values in numbers.items():
        if not isinstance(values, dict):
            record[place] = values
            continue
        there = record.setdefault(place, {})
        told = place == "conditions"  # these say the split themselves
        for name, value in values.items():
            earlier, other = (first, split) if told else found.setdefault((place, name), (measurement, split))
            apart = split != other
            way = difference(earlier if apart else first, measurement, () if told else measurement.names)
            there[f"{name} ({way})" if way and (apart or name in there) else name] = value


def difference(first: Measurement, other: Measurement, without: Collection[str] = ()) -> str:
    """The settings of ``other`` that ``first`` has otherwise: ``split eval, batch 4``; empty where there are none."""
    mine, theirs = (
        dict(_leaves(each.model_dump(mode="json", exclude={"type", "of", *without}))) for each in (first, other)
    )
    return ", ".join(f"{name.split('.')[-1]} {text}" for name, text in theirs.items() if mine.get(name) != text)


def _leaves(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            text = " ".join(map(str, value)) if isinstance(value, list) else "default" if value is None else str(value)
            yield prefix + name, text
