"""The figure of the units that pruning kept: heads, FFN units and hidden dimensions, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from numpy.typing import NDArray

from compress.report.canvas import ACCENT, CARD, drawing
from compress.report.read import Manifest
from compress.report.words import kind_of

BINS = 96
"""An axis (prunable dimension) with more units is drawn as this many groups of neighbours, each with the share kept."""


def kept_units(name: str, manifest: Manifest) -> str | None:
    """Draw one panel per kind of axis (heads, FFN neurons, hidden dimensions), with one row per layer.

    A cell is one unit, or a group of neighbouring units. Kept units are filled.
    """
    if not manifest.kept:
        return None
    grids = {kind: _grid(axes, manifest) for kind, axes in _by_kind(manifest.kept).items()}
    heights = [0.16 + 0.11 * len(grid) for grid in grids.values()]
    with drawing(f"kept-{name}", width=9.8, height=sum(heights) + 0.4 * len(heights)) as canvas:
        panels = canvas.figure.subplots(len(grids), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
        for axes, (kind, grid) in zip(panels, grids.items(), strict=True):
            _panel(axes, grid, _caption(kind, manifest))
    return canvas.svg


def _by_kind(kept: Mapping[str, Sequence[int]]) -> dict[str, list[str]]:
    kinds: dict[str, list[str]] = {}
    for axis in kept:
        kinds.setdefault(kind_of(axis), []).append(axis)
    return kinds


def _grid(axes: Sequence[str], manifest: Manifest) -> NDArray[np.float64]:
    """Return the share of kept units, [layers, cells]."""
    return np.array([_cells(manifest.kept[axis], manifest.sizes[axis]) for axis in axes])


def _cells(kept: Sequence[int], size: int) -> NDArray[np.float64]:
    open_units = np.zeros(size)
    open_units[list(kept)] = 1
    groups = np.array_split(open_units, min(size, BINS))
    return np.array([group.mean() for group in groups])


def _caption(kind: str, manifest: Manifest) -> str:
    counts = {(len(units), manifest.sizes[axis]) for axis, units in manifest.kept.items() if kind_of(axis) == kind}
    numbers = ", ".join(f"{few} of {all_units}" for few, all_units in sorted(counts))
    return f"{kind.replace('_', ' ').replace('.', ' ')}: {numbers}"


def _panel(axes: Axes, grid: NDArray[np.float64], caption: str) -> None:
    colours = np.empty((*grid.shape, 4))
    colours[:] = to_rgba(ACCENT)
    colours[..., 3] = 0.08 + 0.82 * grid
    axes.pcolormesh(colours[::-1], edgecolors=CARD, linewidth=0.25)
    axes.set_title(caption)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    if len(grid) > 1:
        axes.set_ylabel("layers", fontsize=8)
