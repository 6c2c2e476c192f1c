"""The figures of a report. Each function draws one and returns it as SVG, or None if there is nothing to draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from compress.measure.figures import name_of
from compress.measure.metrics.metric import Better
from compress.report.canvas import ACCENT, COLOURS, INK, Mark, drawing, label, scale
from compress.report.numbers import Row, Value, figures_of, front
from compress.report.read import Stage

HISTOGRAMS = 12
"""Maximum number of weight matrices to draw, spread evenly over the model."""


def size_against_quality(rows: Sequence[Row]) -> str | None:
    """Draw quality over megabytes."""
    return _trade_off(rows, lambda row: row.megabytes, "model files, MB", "size")


def latency_against_quality(rows: Sequence[Row]) -> str | None:
    """Draw quality over milliseconds per token."""
    return _trade_off(rows, lambda row: row.per_token, "ms per new token, median", "latency")


def _trade_off(rows: Sequence[Row], cost: Value, cost_label: str, name: str) -> str | None:
    figures = figures_of(rows)
    metric = next(iter(figures), None)
    shown = [row for row in rows if metric in row.quality and cost(row)]
    if metric is None or len(shown) < 2:
        return None
    marks = [_mark(row, cost(row) or 0.0, row.quality[metric]) for row in shown]
    with drawing(name, width=4.6, height=3.5) as canvas:
        draw_trade_off(canvas.figure, marks, cost_label, name_of(metric, figures), figures[metric].better)
    return canvas.svg


def draw_trade_off(figure: Figure, marks: Sequence[Mark], cost_label: str, metric: str, better: Better | None) -> None:
    """Draw labelled points of cost (x) and quality (y), and the line through those that no other point beats.

    There is no such line for a metric without a direction.
    """
    axes = figure.add_subplot()
    scale(axes, "x", [mark.x for mark in marks])
    scale(axes, "y", [mark.y for mark in marks])
    axes.margins(x=0.2, y=0.18)
    if better:
        best = front([(mark.x, mark.y) for mark in marks], lower_is_better=better == "lower")
        axes.step(*zip(*best, strict=True), where="post", color=ACCENT, linewidth=1.2, alpha=0.5, zorder=1)
    for mark in marks:
        axes.plot(mark.x, mark.y, mark.shape, color=mark.colour, markersize=8, zorder=2)
    axes.set_xlabel(cost_label)
    axes.set_ylabel(metric + {"lower": " (less is better)", "higher": " (more is better)", None: ""}[better])
    label(figure, axes, marks)


def _mark(row: Row, x: float, y: float) -> Mark:
    return Mark(row.label, x, y, shape="o" if row.onnx else "s", colour=INK if row.plain else ACCENT)


def losses(name: str, stage: Stage) -> str | None:
    """Draw the training loss of a stage, and each of its terms times its weight. The terms add up to the loss."""
    steps = [line for line in stage.history if "loss" in line]
    if len(steps) < 2:
        return None
    with drawing(f"losses-{name}", width=4.6, height=2.7) as canvas:
        draw_losses(canvas.figure.add_subplot(), steps, weights_of(stage))
    return canvas.svg


def draw_losses(axes: Axes, steps: Sequence[Mapping[str, Any]], weights: Mapping[str, float]) -> None:
    """Draw the loss per step, and each term times its weight. Terms that ``weights`` does not name have weight 1."""
    names = list(dict.fromkeys(name for line in steps for name in line.get("terms", {})))
    if len(names) != 1:
        axes.plot([line["step"] for line in steps], [line["loss"] for line in steps], color=INK, label="total")
    shown = [line["loss"] for line in steps]
    for at, term in enumerate(names):
        weight = weights.get(term, 1.0)
        points = [(line["step"], weight * line["terms"][term]) for line in steps if term in line.get("terms", {})]
        text = term.replace("_", " ") + (f", weighted {weight:g}" if weight != 1 else "")
        axes.plot(*zip(*points, strict=True), color=COLOURS[at % len(COLOURS)], label=text)
        shown += [value for _, value in points]
    scale(axes, "y", shown)
    axes.set_title("training loss")
    axes.set_xlabel("step")
    axes.legend()


def weights_of(stage: Stage) -> dict[str, float]:
    """Return a dict from each term's name in the training curve (its type, and an index if repeated) to its weight."""
    terms = stage.step.config.get("terms", []) if stage.step else []
    types = [term.get("type", "") for term in terms]
    names = [name if types.count(name) == 1 else f"{name}.{at}" for at, name in enumerate(types)]
    return {name: term.get("weight", 1.0) for name, term in zip(names, terms, strict=True)}


def evaluations(name: str, stage: Stage) -> str | None:
    """Draw the loss of a stage on held-out text, with the lowest point marked."""
    points = [(line["step"], line["eval_nll"]) for line in stage.history if "eval_nll" in line]
    if len(points) < 2:
        return None
    with drawing(f"evaluations-{name}", width=4.6, height=2.7) as canvas:
        draw_evaluations(canvas.figure.add_subplot(), points)
    return canvas.svg


def draw_evaluations(axes: Axes, points: Sequence[tuple[int, float]]) -> None:
    """Draw (step, loss per token on held-out text), and mark the lowest."""
    step, value = min(points, key=lambda point: point[1])
    axes.plot(*zip(*points, strict=True), "o-", color=ACCENT, markersize=3.5)
    axes.plot(step, value, "o", color=ACCENT, markersize=9, markerfacecolor="none", label=f"least, step {step:,}")
    axes.set_title("loss per token on held-out text")
    axes.set_xlabel("step")
    axes.legend()


def histograms(name: str, stage: Stage) -> str | None:
    """Draw the weight distributions of a quantized stage, with the quantizer's clip values."""
    found = stage.details.get("histograms", [])
    if not found:
        return None
    last, panels = len(found) - 1, min(len(found), HISTOGRAMS)
    shown = [found[round(at * last / max(panels - 1, 1))] for at in range(panels)]
    columns = min(4, panels)
    rows = -(-panels // columns)
    with drawing(f"histograms-{name}", width=9.8, height=0.35 + 1.35 * rows) as canvas:
        grid = canvas.figure.subplots(rows, columns, squeeze=False).ravel()
        for axes, histogram in zip(grid, shown, strict=False):
            _histogram(axes, histogram)
        for axes in grid[panels:]:
            axes.set_visible(False)
    return canvas.svg


def _histogram(axes: Axes, histogram: Mapping[str, Any]) -> None:
    axes.stairs(histogram["counts"], histogram["edges"], fill=True, color=ACCENT, alpha=0.55)
    for clip in {histogram["clip"], -histogram["clip"]}:
        axes.axvline(clip, color=COLOURS[1], linewidth=1, linestyle=(0, (3, 2)))
    axes.set_title(histogram["module"].removeprefix("transformer."), fontsize=8)
    axes.set_yticks([])
    axes.grid(visible=False)
    axes.locator_params(axis="x", nbins=3)
