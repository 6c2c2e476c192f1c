"""Figures for notebooks. Each function returns a matplotlib figure, which a notebook shows; nothing is written."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from torch import Tensor

from compress.errors import NothingDoneError, UserError
from compress.measure.figures import figure_of, name_of
from compress.measure.formats import MB
from compress.measure.record import Record, scored
from compress.measure.scores import is_number
from compress.registry import suggest
from compress.report.canvas import ACCENT, COLOURS, STYLE, Mark
from compress.report.plots import draw_evaluations, draw_losses, draw_trade_off

_NOTEBOOK: dict[Any, Any] = {**STYLE, "axes.edgecolor": "#888888", "grid.color": "#dddddd", "xtick.color": "#888888"}
"""The style of the reports. Its line colours stand for those of a page, which a notebook does not replace."""


def training(trained: Any, *, weights: Mapping[str, float] | None = None) -> Figure:
    """Draw the training loss with its terms, and the evaluations where there are two or more.

    Args:
        trained: what :func:`compress.distill` or :func:`compress.finetune` returned, or its ``history``.
        weights: the weight of each term of the history by name; 1 for a term that is not named.

    Returns:
        One panel, or two side by side.

    Raises:
        UserError: ``trained`` is not a training result, or ``weights`` names no term of it.
        NothingDoneError: the history has fewer than two steps.

    Examples:
        >>> history = [{"step": 1, "loss": 3.0, "terms": {"a": 3.0}}, {"step": 2, "loss": 2.0, "terms": {"a": 2.0}}]
        >>> len(compress.plots.training(history).axes)
        1
    """
    history = getattr(trained, "history", trained)
    if not isinstance(history, Sequence) or not all(isinstance(line, Mapping) for line in history):
        raise UserError(f"trained: {type(trained).__name__} has no training history; give a result of training")
    _require_lines(history)
    steps = [line for line in history if "loss" in line]
    points = [(line["step"], line["eval_nll"]) for line in history if "eval_nll" in line]
    _require_weights(weights, list(dict.fromkeys(term for line in steps for term in line.get("terms", {}))))
    if len(steps) < 2:
        raise NothingDoneError(f"trained: has {len(steps)} steps, but a curve needs at least 2")
    panels = 2 if len(points) > 1 else 1
    with _figure(4.6 * panels, 2.7) as figure:
        axes = figure.subplots(1, panels, squeeze=False)[0]
        draw_losses(axes[0], steps, weights or {})
        if panels == 2:
            draw_evaluations(axes[1], points)
    return figure


def pareto(records: Sequence[Mapping[str, Any]], *, metric: str = "perplexity") -> Figure:
    """Draw quality against size, and the line through the models that no other model beats on both.

    Args:
        records: one per model with ``name``, ``bytes`` (of the model files) and ``quality`` (a dict from metric name to
            value), as a run writes them. Records without a size or without the metric are left out.
        metric: the metric on the vertical axis.

    Returns:
        One panel; sizes are in MB of 2^20 bytes.

    Raises:
        UserError: ``records`` is not a list of records, or no record has the metric.
        NothingDoneError: fewer than two records have both the metric and a size.

    Examples:
        >>> sizes = {"base": (2**22, 20.0), "small": (2**20, 25.0)}
        >>> records = [{"name": n, "bytes": b, "quality": {"perplexity": p}} for n, (b, p) in sizes.items()]
        >>> compress.plots.pareto(records).axes[0].get_ylabel()
        'perplexity (less is better)'
    """
    records = getattr(records, "records", records)  # what compress.run returns
    _require_records(records)
    known = list(dict.fromkeys(name for record in records for name in record.get("quality", {})))
    if metric not in known:
        raise UserError(f"metric: no record has {metric!r}. {suggest(metric, known)}")
    shown = [record for record in records if metric in record.get("quality", {}) and "bytes" in record]
    if len(shown) < 2:
        raise NothingDoneError(f"records: {len(shown)} have {metric} and a size (bytes); a figure needs at least 2")
    if odd := next((each for each in shown if not is_number(each["quality"][metric])), None):
        raise UserError(f"records: expected a number as {metric} of {odd['name']}, got {odd['quality'][metric]!r}")
    marks = [Mark(each["name"], each["bytes"] / MB, each["quality"][metric], "o", ACCENT) for each in shown]
    figures = scored(map(Record.model_validate, shown))
    with _figure(4.6, 3.5) as figure:
        draw_trade_off(figure, marks, "model files, MB", name_of(metric, figures), figure_of(metric, figures).better)
    return figure


def masks(masks: Any) -> Figure:
    """Draw the mask values of the units of each prunable dimension (axis: heads, FFN neurons, hidden dimensions).

    Values are sorted from the largest to the smallest. There is one panel per kind of axis.

    Args:
        masks: what :func:`compress.learn_masks` or :func:`compress.score` returned, or a dict from axis name to a
            tensor with one value per unit.

    Returns:
        A panel for each of ``hidden``, ``heads`` and ``ffn`` (preceded by ``encoder`` or ``decoder`` if the model has
        both), with one line per layer.

    Raises:
        UserError: ``masks`` is not a set of masks.
        NothingDoneError: there are no masks.

    Examples:
        >>> figure = compress.plots.masks({"layer.0.heads": torch.tensor([1.0, 0.2])})
        >>> figure.axes[0].get_title(loc="left")
        'heads'
    """
    values = getattr(masks, "values", None) if not isinstance(masks, Mapping) else masks
    if not isinstance(values, Mapping) or not all(isinstance(value, Tensor) for value in values.values()):
        raise UserError(
            f"masks: {type(masks).__name__} contains no mask values; give the result of learn_masks or score"
        )
    for axis, value in values.items():
        if not isinstance(axis, str) or value.ndim != 1 or not value.numel():
            raise UserError(f"masks: {axis!r} has values of shape {list(value.shape)}; expected one per unit")
    if not values:
        raise NothingDoneError("masks: contains no axis")
    kinds: dict[str, list[tuple[str, Tensor]]] = {}
    for axis, value in values.items():
        kinds.setdefault(_kind(axis), []).append((axis, value))
    with _figure(3.2 * len(kinds), 2.7) as figure:
        for panel, (kind, axes) in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds.items(), strict=True):
            for at, (axis, value) in enumerate(axes):
                ordered = value.detach().float().cpu().sort(descending=True).values.tolist()
                panel.plot(range(1, len(ordered) + 1), ordered, color=COLOURS[at % len(COLOURS)], label=axis)
            panel.set_title(kind)
            panel.set_xlabel("units, largest first")
            if 1 < len(axes) <= len(COLOURS):
                panel.legend()
    return figure


def _require_lines(history: Sequence[Mapping[str, Any]]) -> None:
    """Raise UserError if a line of the history contains a value that is not a number."""
    for at, line in enumerate(history):
        terms = line.get("terms", {})
        if not isinstance(terms, Mapping):
            raise UserError(f"trained: line {at} of the history: expected terms as a mapping of names to numbers")
        known = {"step": line.get("step")} | {key: line[key] for key in ("loss", "eval_nll") if key in line} | {**terms}
        for name, value in known.items():
            if not is_number(value):
                raise UserError(f"trained: line {at} of the history: expected a number for {name}, got {value!r}")


def _require_weights(weights: Any, terms: Sequence[str]) -> None:
    if weights is None:
        return
    if not isinstance(weights, Mapping):
        raise UserError(f"weights: expected a mapping of term names to numbers, got {type(weights).__name__}")
    for name, weight in weights.items():
        if name not in terms:
            raise UserError(f"weights: no term is called {name!r}. {suggest(name, terms)}")
        if not is_number(weight):
            raise UserError(f"weights: expected a number for {name}, got {weight!r}")


def _require_records(records: Any) -> None:
    """Raise UserError if ``records`` is not a list of records, or if a name or size has the wrong type."""
    if not isinstance(records, Sequence) or isinstance(records, str | bytes):
        raise UserError(f"records: expected a list of records, got {type(records).__name__}")
    for at, record in enumerate(records):
        if not isinstance(record, Mapping) or not isinstance(record.get("quality", {}), Mapping):
            raise UserError(f"records: expected item {at} to have quality, a mapping of metric names to values")
        if not isinstance(record.get("name"), str):
            raise UserError(f"records: expected a string as name of item {at}, got {record.get('name')!r}")
        if not is_number(record.get("bytes", 0)):
            raise UserError(f"records: expected a number as bytes of item {at}, got {record['bytes']!r}")


def _kind(axis: str) -> str:
    """Return the name of an axis without the number of its layer: ``encoder ffn`` for ``encoder.layer.3.ffn``."""
    parts = [part for part in axis.split(".") if not part.isdigit() and part not in ("layer", "layers")]
    return " ".join(parts) or axis


class _Shown(Figure):
    """A figure that a notebook shows by itself. It shows others only once ``matplotlib.pyplot`` has been imported."""

    def _repr_png_(self) -> bytes:
        picture = io.BytesIO()
        self.savefig(picture, format="png", bbox_inches="tight")
        return picture.getvalue()


@contextmanager
def _figure(width: float, height: float) -> Iterator[Figure]:
    """Yield a figure in the style of reports. It has no window, so a notebook shows it once, as the cell's value."""
    with matplotlib.rc_context(_NOTEBOOK):
        yield _Shown(figsize=(width, height))
