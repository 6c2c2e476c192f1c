"""The common style of all figures: SVG in the text and line colours of the page, so that light and dark both work."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

ACCENT = "#3d7fc4"
COLOURS = (ACCENT, "#d97b2f", "#3f9e78", "#9a6cc9", "#cf5561", "#8b8f3a", "#2f9aa8", "#b0677f")
INK = "#010203"
"""Placeholder for the text colour of the page. No figure uses this colour for anything else."""

LINE = "#040506"
"""Placeholder for the page's colour of thin lines."""

CARD = "#070809"
"""Placeholder for the page's background colour of figures."""

STYLE: Mapping[Any, Any] = {
    "axes.edgecolor": LINE,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 9,
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.5,
    "svg.fonttype": "none",
    "text.color": INK,
    "xtick.color": LINE,
    "xtick.labelcolor": INK,
    "xtick.labelsize": 8,
    "ytick.color": LINE,
    "ytick.labelcolor": INK,
    "ytick.labelsize": 8,
}

POINTS = 72
LETTER = 5.0
"""Upper estimate of the width of a label's letter in points."""


@dataclass
class Canvas:
    """A figure during drawing, and its SVG afterwards."""

    figure: Figure
    svg: str = field(default="", init=False)


@contextmanager
def drawing(name: str, *, width: float, height: float) -> Iterator[Canvas]:
    """Draw inside the block. The SVG is complete after it. ``name`` makes the ids of the figure unique on a page."""
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        canvas = Canvas(Figure(figsize=(width, height)))
        yield canvas
        text = io.StringIO()
        canvas.figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    canvas.svg = _page_svg(text.getvalue(), re.sub(r"\W+", "-", name))


def _page_svg(svg: str, name: str) -> str:
    """Adapt a stand-alone SVG to a page: no prologue, no fixed size, unique ids, the colours of the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' width="([\d.]+)pt" height="[\d.]+pt"', r' style="max-width:\1pt"', svg, count=1)
    svg = re.sub(r'((?:id="|url\(#|href="#))', rf"\1{name}-", svg)
    return svg.replace(INK, "currentColor").replace(LINE, "var(--line)").replace(CARD, "var(--card)").strip()


@dataclass(frozen=True)
class Mark:
    """A labelled point."""

    name: str
    x: float
    y: float
    shape: str
    colour: str


@dataclass(frozen=True)
class _Box:
    left: float
    bottom: float
    right: float
    top: float

    def overlaps(self, other: _Box) -> bool:
        return (
            self.left < other.right and other.left < self.right and self.bottom < other.top and other.bottom < self.top
        )


def label(figure: Figure, axes: Axes, marks: Sequence[Mark]) -> None:
    """Write each point's name beside it, where it covers no point and no other name."""
    scale = POINTS / figure.dpi
    figure.draw_without_rendering()
    frame = axes.get_window_extent()
    places = [axes.transData.transform((mark.x, mark.y)) * scale for mark in marks]
    taken = [_Box(x - 4, y - 4, x + 4, y + 4) for x, y in places]
    for mark, (x, y) in zip(marks, places, strict=True):
        width = LETTER * len(mark.name)
        choices = _offsets(width)
        inside = [(dx, dy) for dx, dy in choices if frame.x0 * scale <= x + dx and x + dx + width <= frame.x1 * scale]
        boxes = [(_Box(x + dx, y + dy - 5, x + dx + width, y + dy + 5), (dx, dy)) for dx, dy in inside or choices]
        box, offset = next((c for c in boxes if not any(c[0].overlaps(other) for other in taken)), boxes[0])
        taken.append(box)
        axes.annotate(mark.name, (mark.x, mark.y), offset, textcoords="offset points", va="center", fontsize=8)


def _offsets(width: float) -> list[tuple[float, float]]:
    """Return positions for a label around its point, nearest first, not on horizontal or vertical lines through it."""
    return [(dx, dy) for dy in (9.0, -9.0, 20.0, -20.0) for dx in (5.0, -5.0 - width)]


def scale(axes: Axes, axis: Literal["x", "y"], values: Sequence[float]) -> None:
    """Make an axis logarithmic, with plain numbers, if its values are positive and span a wide range."""
    if min(values) <= 0 or max(values) < 3 * min(values):
        return
    axes.set(**{f"{axis}scale": "log"})
    ticks = axes.xaxis if axis == "x" else axes.yaxis
    ticks.set_major_locator(LogLocator(subs=(1, 2, 5) if max(values) < 300 * min(values) else (1,)))
    ticks.set_minor_locator(NullLocator())
    ticks.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
