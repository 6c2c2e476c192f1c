"""One record per artifact, joined from all that was measured of it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from compress.measure.measurement import Measurement


def join(record: dict[str, Any], numbers: Mapping[str, Any], first: Measurement, measurement: Measurement) -> None:
    """Add what a measurement found to the record of an artifact; nothing that is there already is overwritten.

    ``first`` is the first measurement of this type that was taken of the artifact. Where a later one found a number of
    the same name, both stay: the later as ``perplexity (split eval)``, its name with what was measured otherwise. Its
    conditions stand beside those of the first in the same way.
    """
    ways = {False: difference(first, measurement, without=measurement.names), True: difference(first, measurement)}
    for place, found in numbers.items():
        if not isinstance(found, dict):
            record[place] = found
            continue
        there, way = record.setdefault(place, {}), ways[place == "conditions"]
        there.update({f"{name} ({way})" if way and name in there else name: value for name, value in found.items()})


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
