"""The parts of a report as plain text in rows and columns. The templates only lay them out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from compress.measure import formats
from compress.measure.columns import Column, Measured, Table, columns, laid_out
from compress.measure.figures import name_and_way, name_of
from compress.report import numbers
from compress.report.numbers import Row, Value, change, figures_of, smallest, speedup
from compress.report.read import Run, Stage, Step, Touched

Cell = Callable[[Row], str]


def measured(rows: Sequence[Row]) -> Table:
    """Return every artifact with all of its measurements."""
    first = next(iter(figures_of(rows)), "")
    compared = [Measured(row.label, row.record, change(rows, row, first), speedup(rows, row)) for row in rows]
    return laid_out(compared, columns(compared))


def exports(rows: Sequence[Row]) -> Table:
    """Return the effect of the export settings: each export compared with the first float export of its run."""
    found = numbers.exports(rows)
    figures = figures_of(found)
    first = next(iter(figures), "")
    columns: list[Column[Row]] = [
        Column("form", "", lambda row: row.form),
        Column("size", "MB", lambda row: formats.megabytes(row.record.bytes)),
        Column("smaller", "", _times(found, lambda row: row.megabytes)),
        Column("per token", "ms", lambda row: formats.number(row.per_token)),
        Column("faster", "per token", _times(found, lambda row: row.per_token)),
        Column("prefill", "ms", lambda row: formats.number(row.prefill)),
        Column("faster", "prefill", _times(found, lambda row: row.prefill)),
        Column(name_of(first, figures), "", lambda row: formats.number(row.quality.get(first))),
        Column("change", f"of {name_of(first, figures)}", _change_of_first(found, numbers.quality(first))),
        Column("peak memory", "MB", lambda row: formats.megabytes(row.record.speed.peak_rss_bytes)),
    ]
    return laid_out(found, columns)


def _times(rows: Sequence[Row], value: Value) -> Cell:
    """Return the factor by which a row's value is lower than that of the first row of its run."""
    share = _share_of_first(rows, value)
    return lambda row: formats.ratio(1 / found) if (found := share(row)) else ""


def _change_of_first(rows: Sequence[Row], value: Value) -> Cell:
    share = _share_of_first(rows, value)
    return lambda row: formats.percent(found - 1) if (found := share(row)) else ""


def _share_of_first(rows: Sequence[Row], value: Value) -> Value:
    def share(row: Row) -> float | None:
        first = next(other for other in rows if other.run is row.run)
        ours, base = value(row), value(first)
        return None if first is row or not ours or not base else ours / base

    return share


def tiles(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Return the most important numbers of the smallest artifact, as pairs (number, label)."""
    row = smallest(rows)
    if row is None:
        return []
    metric = next(iter(row.quality), "")
    gain = speedup(rows, row)
    found = [
        (formats.ratio(row.record.compression_ratio), "smaller"),
        (
            formats.ratio(1 / gain if gain and gain < 1 else gain),
            f"{'slower' if gain and gain < 1 else 'faster'} per token",
        ),
        (formats.percent(change(rows, row, metric)), name_of(metric, row.record.figures)),
        (f"{formats.megabytes(row.record.bytes)} MB", "on disk"),
    ]
    return [(figure, caption) for figure, caption in found if figure]


def stages(runs: Sequence[Run]) -> Table:
    """Return a table of what each stage did."""
    return Table(
        titles=[
            ("stage", ""),
            ("type", ""),
            ("from", ""),
            ("touched", ""),
            ("tensors", "MB"),
            ("time", ""),
            ("recorded", ""),
        ],
        lines=[_stage(run, stage, f"{run.name}/" if len(runs) > 1 else "") for run in runs for stage in run.stages],
    )


def _stage(run: Run, stage: Stage, prefix: str) -> list[str]:
    entry, step = stage.entry, stage.step
    coverage = step.coverage if step else None
    seconds = step.seconds if step and step.seconds is not None else entry.seconds
    return [
        prefix + entry.name,
        entry.type,
        run.sources(stage) or "–",
        _touched(coverage) if coverage else "not recorded",
        _bytes(coverage) if coverage else "–",
        formats.duration(seconds) + (" (reused)" if entry.reused else ""),
        _metrics(step.metrics if step else {}),
    ]


def _touched(coverage: Touched) -> str:
    text = f"{coverage.modules_touched} of {coverage.modules_total} modules"
    if coverage.parameters_touched <= coverage.parameters_total:  # there may be more scored units than parameters
        text += f", {formats.share(coverage.parameters_touched, coverage.parameters_total)} of parameters"
    return f"{text} ({coverage.note})" if coverage.note else text


def _bytes(coverage: Touched) -> str:
    if coverage.bytes_before is None or coverage.bytes_after is None:
        return "–"
    return f"{formats.megabytes(coverage.bytes_before)} → {formats.megabytes(coverage.bytes_after)}"


def _metrics(metrics: Mapping[str, float]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {formats.number(_whole(value))}" for name, value in metrics.items())


def _whole(value: float) -> float:
    """Turn a count that was recorded as a float back into a whole number."""
    return int(value) if float(value).is_integer() else value


def conditions(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Return the conditions of all measurements. A condition of only some artifacts names them."""
    values: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        for key, text in _own_conditions(row):
            values.setdefault(key, {}).setdefault(text, []).append(row.label)
    return [(key, _who(found, len(rows))) for key, found in values.items()]


def _own_conditions(row: Row) -> Iterator[tuple[str, str]]:
    numbers = row.record.quality
    how = {key: numbers[key] for key in numbers if key not in row.quality and name_and_way(key)[0] != "samples"}
    yield from formats.flat({"quality": how})
    yield from formats.flat({"speed": row.record.speed.model_extra})
    yield from formats.flat(row.record.conditions)


def _who(found: dict[str, list[str]], everyone: int) -> str:
    if len(found) == 1:
        return next(iter(found))
    return "; ".join(
        f"{text} ({'all others' if len(names) > everyone / 2 else ', '.join(names)})" for text, names in found.items()
    )


def environment(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Return the machine, the versions and the seeds. Values that differ between runs are listed for each run."""
    pairs = [
        (f"{run.name}: {key}", key, text)
        for run in runs
        for key, text in formats.flat({**run.environment, "seed": run.file.seed})
    ]
    texts = {key: {text for _, other, text in pairs if other == key} for _, key, _ in pairs}
    return list(dict.fromkeys((key if len(texts[key]) == 1 else long, text) for long, key, text in pairs))


def lineage(rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    """Return (artifact, the stages it went through, its digest)."""
    return [
        (row.label, " → ".join(map(_lineage_step, row.manifest.lineage)) or "as given", row.manifest.digest)
        for row in rows
    ]


def _lineage_step(step: Step) -> str:
    targets = step.config.get("targets")
    return f"{step.stage} (targets {targets})" if targets else step.stage
