"""The results of metrics: checked, joined, and described for a record."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

from compress.errors import CompressError, RecipeError
from compress.measure.metrics.metric import Metric
from compress.problem import Problem
from compress.registry import METRICS

Values = dict[str, Any]


def checked(name: str, result: Mapping[str, Any]) -> tuple[Values, str]:
    """Return the values of a metric's result, and its signature. Raise if none is a number, or one is not finite."""
    values = {key: _plain(value) for key, value in result.items() if key != "signature"}
    figures = {key: value for key, value in values.items() if is_number(value)}
    if "conditions" in figures:
        text = f"{name} gives a number called conditions, which is the place of the settings; rename it"
        raise RecipeError(Problem(("metric",), text))
    if not figures:
        text = f"{name} gives no number; it gives {', '.join(values) or 'nothing'}"
        raise RecipeError(Problem(("metric",), text))
    if broken := next((key for key, value in figures.items() if not math.isfinite(value)), None):
        text = f"{name} gives {figures[broken]} for {broken}, which is not a finite number"
        raise CompressError(Problem(("metric",), text))
    return values, str(result.get("signature", ""))


def is_number(value: object) -> bool:
    """Return whether a value of a result is a number."""
    return isinstance(value, Real) and not isinstance(value, bool)


def _plain(value: Any) -> Any:
    """Return a number of another library, such as numpy, as a Python number, and any other value unchanged."""
    return (int if isinstance(value, Integral) else float)(value) if is_number(value) else value


def joined(results: Mapping[str, Values]) -> Values:
    """Return the values of several metrics. Raises RecipeError if two of them give one key with different values."""
    found: Values = {}
    origins: dict[str, str] = {}
    for name, values in results.items():
        for key, value in values.items():
            if found.setdefault(key, value) != value:
                text = f"{origins[key]} and {name} both give {key!r}; measure them apart"
                raise RecipeError(Problem(("metric",), text))
            origins.setdefault(key, name)
    return found


def declared(metrics: Mapping[str, Metric], values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the declarations of these values by metrics that are not built in, which a report may need later."""
    others = [metric for name, metric in metrics.items() if metric is not _built_in(name)]
    figures = {key: figure for metric in others for key, figure in metric.figures.items()}
    return {key: figures[key].model_dump(exclude_defaults=True) for key in values if key in figures}


def _built_in(name: str) -> Metric | None:
    return METRICS.get(name) if name in METRICS.builtin else None
