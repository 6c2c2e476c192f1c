"""The sentences of a report. Each is computed from the numbers it mentions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from compress.measure.figures import name_of
from compress.measure.formats import flat, megabytes, number, percent, ratio
from compress.report.gate import slow
from compress.report.numbers import (
    Row,
    change,
    original,
    quality,
    reference,
    smallest,
    speedup,
)
from compress.report.read import Run


def headline(rows: Sequence[Row]) -> str:
    """Return one sentence about the smallest model of the run: its size, speed and quality."""
    row = smallest(rows)
    if row is None:
        small = [other.label for other in rows if not other.plain]
        if not small:
            return "No stage of this run made a smaller model, so there is nothing to compare."
        verb = "is" if len(small) == 1 else "are"
        return f"{_listed(small)} {verb} compressed, but no size was measured; put {{type: size}} under measure."
    return f"{row.label} {_size(rows, row)}{_speed(rows, row)}; {_quality(rows, row)}."


def _size(rows: Sequence[Row], row: Row) -> str:
    base = original(rows, row, lambda other: other.megabytes)
    size = f"{megabytes(row.record.bytes)} MB"
    if row.record.compression_ratio is None or base is None:
        return f"takes {size}"
    sizes = f"{megabytes(base.record.bytes)} → {size}"
    return f"is {ratio(row.record.compression_ratio)} smaller than {base.label} in float32 ({sizes})"


def _speed(rows: Sequence[Row], row: Row) -> str:
    gain, base = speedup(rows, row), reference(rows, row, lambda other: other.per_token)
    if gain is None or base is None:
        return ""
    pace = f"{ratio(gain)} faster" if gain >= 1 else f"{ratio(1 / gain)} slower"
    where = "" if base.onnx == row.onnx else f" in {_runtime(base)}"
    return f" and {pace} per token than {base.label}{where} on this {_device(row)}"


def _runtime(row: Row) -> str:
    return "ONNX Runtime" if row.onnx else "torch"


def _quality(rows: Sequence[Row], row: Row) -> str:
    for metric in row.quality:
        name = name_of(metric, row.record.figures)
        base = original(rows, row, quality(metric))
        if base is not None:
            of_base = "" if base is original(rows, row, lambda other: other.megabytes) else f" of {base.label}"
            words = f"{name}{of_base} {number(base.quality[metric])} → {number(row.quality[metric])}"
            return f"{words} ({percent(change(rows, row, metric))})"
    for metric, value in row.quality.items():
        return f"{name_of(metric, row.record.figures)} {number(value)}, with no uncompressed model to compare with"
    return "its quality was not measured"


def _device(row: Row) -> str:
    return "CPU" if "cpu" in device_of(row) else "GPU"


def device_of(row: Row) -> str:
    """Return the recorded device on which the speed of ``row`` was measured. ``cpu`` if none was recorded."""
    recorded = [row.record.conditions, row.record.speed.model_extra, row.run.environment]
    for key, value in flat(recorded):
        if key.split(".")[-1] in ("device", "provider"):
            return value.lower()
    return "cpu"


def warnings(runs: Sequence[Run], rows: Sequence[Row]) -> list[str]:
    """Return the warnings that a reader should know before using the numbers."""
    found = [*slow(rows), *_emulated(rows), *_mixed(rows), *_reload(runs)]
    if len([run for run in runs if any(row.per_token for row in rows if row.run is run)]) > 1:
        found.append("Times of different runs were measured at different moments; compare them only within one run.")
    return found


def _emulated(rows: Sequence[Row]) -> Iterator[str]:
    if names := [row.label for row in rows if row.emulated and row.per_token]:
        yield (
            f"The times of {_listed(names)} were measured with quantization emulated in float32; "
            "measure an export for speed."
        )


def _mixed(rows: Sequence[Row]) -> Iterator[str]:
    for row in rows:
        base = reference(rows, row, lambda other: other.per_token)
        if row.per_token and base is not None and base.onnx != row.onnx:
            yield (
                f"{row.label} ran in {_runtime(row)} and {base.label} in {_runtime(base)}: "
                "the speed-up includes the change of runtime."
            )


def _reload(runs: Sequence[Run]) -> Iterator[str]:
    for run in runs:
        for stage in run.stages:
            kept, name = stage.manifest.kept, stage.entry.name
            if stage.entry.type != "prune" or not kept:
                continue
            sizes = _sizes_by_kind(kept)
            if any(len(lengths) > 1 for lengths in sizes.values()):
                yield f"{name} keeps different sizes in different layers; only compress.load opens it."
            elif stage.step and stage.step.coverage and stage.step.coverage.note:
                yield f"{name} has a shape that no transformers class supports; it {stage.step.coverage.note}."
            elif sizes.get("encoder.heads") != sizes.get("decoder.heads"):
                yield f"{name} has unequal encoder and decoder heads; only compress.onnx.runtime runs its ONNX export."


def _sizes_by_kind(kept: dict[str, list[int]]) -> dict[str, set[int]]:
    sizes: dict[str, set[int]] = {}
    for axis, units in kept.items():
        sizes.setdefault(kind_of(axis), set()).add(len(units))
    return sizes


def kind_of(axis: str) -> str:
    """Return the name of an axis without its layer: ``decoder.layer.3.heads`` becomes ``decoder.heads``."""
    parts = axis.split(".")
    if "layer" in parts:
        at = parts.index("layer")
        parts = parts[:at] + parts[at + 2 :]
    return ".".join(parts)


def not_measured(rows: Sequence[Row]) -> list[str]:
    """Return the numbers that a reader may expect but that were not measured, with the reason."""
    late = [row.label for row in rows if row.late]
    here = [row for row in rows if not row.late]
    missing = {
        "quality": [row.label for row in here if not row.quality],
        "speed": [row.label for row in here if not row.record.speed.timed],
        "size": [row.label for row in here if row.record.bytes is None],
    }
    found = [
        f"{what} of {'any artifact' if len(names) == len(rows) else _listed(names)}: the recipe does not measure it"
        for what, names in missing.items()
        if names
    ]
    if late:
        what = "any artifact" if len(late) == len(rows) else _listed(late)
        found.append(f"{what}, in its present state: the run stopped before it was measured; run the recipe to its end")
    timed = [row for row in rows if row.record.speed.timed]
    if timed and all("cpu" in device_of(row) for row in timed):
        found.append("speed on a GPU: this run used the CPU")
    return found


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
