"""Formats numbers for readers. A number that was not measured becomes an empty string."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from compress.measure.record import Percentiles
from compress.training import progress

MB = 2**20
"""Bytes in a megabyte, everywhere in this project."""


def number(value: float | None) -> str:
    """Three or four significant digits; integers in full. Thousands are separated, up to 10^9."""
    if value is None:
        return ""
    if isinstance(value, int):
        return f"{value:,}"
    size = abs(value)
    if size < 1 or size >= 1e9:
        return f"{value:.3g}"
    return f"{value:,.{0 if size >= 1000 else 1 if size >= 100 else 2}f}"


def megabytes(value: float | None) -> str:
    """Return bytes as MB of 2^20 bytes."""
    return "" if value is None else number(value / MB)


def count(value: int | None) -> str:
    """Return a count as millions or thousands: ``124.4 M``."""
    if value is None:
        return ""
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return str(value)


def ratio(value: float | None) -> str:
    """Return a factor: ``14.2x``."""
    return "" if value is None else f"{value:.{1 if value >= 1.95 else 2}f}x"


def percent(value: float | None) -> str:
    """Return a relative change with its sign: ``+5.7 %``."""
    return "" if value is None else f"{100 * value:+.1f} %"


def share(part: float, whole: float) -> str:
    """Return a part of a whole: ``98 %``. Rounding alone never gives 100 % or 0 %."""
    if not whole:
        return "0 %"
    exact = 100 * part / whole
    if part in (0, whole):
        return f"{exact:.0f} %"
    return f"{min(max(exact, 0.1), 99.9):.1f} %"


def percentiles(value: Percentiles | None) -> str:
    """Return median and 95th percentile: ``3.41 / 3.80``."""
    if value is None:
        return ""
    return number(value.p50) if value.p95 is None else f"{number(value.p50)} / {number(value.p95)}"


def duration(seconds: float | None) -> str:
    """Return a time span in its two largest units: ``1 h 04 min``."""
    return "" if seconds is None else progress.duration(seconds)


def flat(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the leaves of nested JSON as (dotted key, text)."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from flat(inner, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, Sequence) and not isinstance(value, str):
        if any(isinstance(inner, Mapping) for inner in value):
            for inner in value:
                yield from flat(inner, prefix)
        elif value:
            yield prefix, ", ".join(map(str, value))
    elif prefix.endswith("_bytes") and isinstance(value, int):
        yield prefix.removesuffix("_bytes"), f"{value / MB:,.0f} MB"
    elif isinstance(value, float):
        yield prefix, f"{value:.6g}"
    elif value is not None and value != "":
        yield prefix, str(value)
