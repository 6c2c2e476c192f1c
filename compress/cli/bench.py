"""The ``speed`` measurement over model directories named on the command line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from compress.artifact import adopt_deployed
from compress.errors import UserError
from compress.measure.speed import compare_with_first
from compress.pipeline.running import Device, choose_device
from compress.registry import MEASUREMENTS


def bench_models(
    paths: Sequence[Path], settings: Mapping[str, Any], device: Device | None, console: Console
) -> list[dict[str, Any]]:
    """Measure every directory in one interleaved run. Return one record per directory, in the order given.

    ``speed.faster`` is the speedup over the first directory, for ``prefill`` and ``per_token``.
    """
    names = labels(paths)
    artifacts = {name: adopt_deployed(path) for name, path in zip(names, paths, strict=True)}
    given = {name: value for name, value in settings.items() if value is not None}
    measurement = MEASUREMENTS.read({"type": "speed", "of": "all", **given})
    numbers = measurement.run(artifacts, data=None, device=choose_device(device), console=console)
    records = [{"name": name, **numbers[name]} for name in names]
    compare_with_first(records)
    return records


def labels(paths: Sequence[Path]) -> list[str]:
    """Return the name of each directory, with as many parents as are needed to make it unique.

    Raises UserError if a directory is given twice.
    """
    parts = [path.resolve().parts for path in paths]
    if repeated := next((path for path, own in zip(paths, parts, strict=True) if parts.count(own) > 1), None):
        raise UserError(f"bench: {repeated} is given twice; give each directory once")
    return [next(label for label, count in _tails(own, parts) if count == 1) for own in parts]


def _tails(own: tuple[str, ...], parts: Sequence[tuple[str, ...]]) -> Iterator[tuple[str, int]]:
    """Longer and longer endings of a path, each with the number of paths that share it."""
    for depth in range(1, len(own) + 1):
        tail = own[-depth:]
        yield str(Path(*tail)), sum(other[-depth:] == tail for other in parts)
