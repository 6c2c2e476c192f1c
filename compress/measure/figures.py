"""Labels, directions and order of metric values, by their keys in a record."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from compress.measure.metrics.metric import Figure
from compress.registry import METRICS


def name_and_way(key: str) -> tuple[str, str]:
    """Split a key such as ``perplexity (split eval)`` into the name and the settings that differ from the first."""
    name, _, way = key.partition(" (")
    return name, way.removesuffix(")")


def figure_of(key: str, recorded: Mapping[str, Figure] | None = None) -> Figure:
    """Return the declaration of a metric value: from its record, or else from a built-in metric.

    A value without a declaration has its key as label, no direction, and a place after those of built-in metrics.
    """
    name, _ = name_and_way(key)
    own = {name_and_way(other)[0]: figure for other, figure in (recorded or {}).items()}
    found = own.get(name) or _built_in().get(name) or Figure()
    return found if found.label else found.model_copy(update={"label": name.replace("_", " ")})


def name_of(key: str, recorded: Mapping[str, Figure] | None = None) -> str:
    """Return the name of a metric value in running text."""
    label, (_, way) = figure_of(key, recorded).label, name_and_way(key)
    return f"{label} ({way})" if way else label


@cache
def _built_in() -> dict[str, Figure]:
    """Return the declared values of built-in metrics. Plug-ins may be missing when a report is written."""
    return {key: figure for name in METRICS.builtin for key, figure in METRICS.get(name).figures.items()}
