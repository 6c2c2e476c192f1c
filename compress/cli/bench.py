"""The ``speed`` measurement over model directories named on the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from compress.artifact import adopt
from compress.errors import UserError
from compress.pipeline.running import Device, choose_device
from compress.registry import MEASUREMENTS


def bench_models(
    paths: Sequence[Path], settings: Mapping[str, Any], device: Device | None, console: Console
) -> list[dict[str, Any]]:
    """Measure every directory in one interleaved run; return a record per directory, in the order given.

    ``speed.faster`` says how many times as fast as the first directory it is, ``prefill`` and ``per_token``.
    """
    names = [path.resolve().name for path in paths]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"bench: two directories are called {repeated!r}; give each directory once")
    artifacts = {name: adopt(path) for name, path in zip(names, paths, strict=True)}
    given = {name: value for name, value in settings.items() if value is not None}
    measurement = MEASUREMENTS.read({"type": "speed", "of": "all", **given})
    numbers = measurement.run(artifacts, data=None, device=choose_device(device), console=console)
    first = numbers[names[0]]["speed"]
    for record in numbers.values():
        record["speed"]["faster"] = {
            part: first[f"{part}_ms"]["p50"] / record["speed"][f"{part}_ms"]["p50"] for part in ("prefill", "per_token")
        }
    return [{"name": name, **numbers[name]} for name in names]
