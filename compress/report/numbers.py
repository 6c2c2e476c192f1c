"""Numbers derived from the measurements of a run: references, ratios, changes and the trade-off front."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from compress.measure.figures import name_and_way
from compress.measure.formats import MB
from compress.measure.metrics.metric import Figure
from compress.measure.record import Record, scored
from compress.report.read import Manifest, Run


@dataclass(frozen=True)
class Row:
    """One artifact with its measurements."""

    label: str
    run: Run
    record: Record
    manifest: Manifest

    @property
    def plain(self) -> bool:
        """Whether the model is uncompressed: not pruned, not quantized, and not a smaller student of another model."""
        return not set(self.manifest.traits) - {"onnx"} and not self._student

    @property
    def _student(self) -> bool:
        """Whether stages made the artifact and it has fewer parameters than the run's first model."""
        ours, whole = self.record.parameters, self.run.records[0].parameters
        return bool(self.manifest.lineage) and ours is not None and whole is not None and ours < whole

    @property
    def onnx(self) -> bool:
        """Whether it runs in ONNX Runtime."""
        return "onnx" in self.manifest.traits

    @property
    def late(self) -> bool:
        """Whether the run has not measured it yet."""
        return self.run.late(self.record)

    @property
    def emulated(self) -> bool:
        """Whether torch emulates its quantization in float32. Its times then say nothing about a deployed model."""
        return self.manifest.quantization is not None and not self.onnx

    @property
    def quality(self) -> dict[str, float]:
        """A dict from metric name to value, the most informative first."""
        return self.record.scores

    @property
    def megabytes(self) -> float | None:
        """Size of the model files in MB of 2^20 bytes."""
        return None if self.record.bytes is None else self.record.bytes / MB

    @property
    def per_token(self) -> float | None:
        """Median milliseconds for one new token."""
        times = self.record.speed.per_token_ms
        return None if times is None else times.p50

    @property
    def prefill(self) -> float | None:
        """Median milliseconds from a prompt to its first new token."""
        times = self.record.speed.prefill_ms
        return None if times is None else times.p50

    @property
    def products(self) -> list[dict[str, Any]]:
        """The quantized matrices of linear layers. Tables that are used only for lookup are left out."""
        matrices = (self.manifest.quantization or {}).get("matrices", [])
        tables = self.run.details(self.record.name).get("tables", ())
        return [matrix for matrix in matrices if matrix.get("module") not in tables]

    @property
    def weight_only(self) -> bool:
        """Whether its weights are quantized but the inputs of its linear layers are not."""
        return bool(self.products) and all(matrix.get("activations") == "none" for matrix in self.products)

    @property
    def form(self) -> str:
        """The number formats of its weights and activations: ``W2A8``, or ``float32``."""
        if self.manifest.quantization is None:
            return "float32"
        bits = sorted({str(matrix.get("bits", "")) for matrix in self.manifest.quantization.get("matrices", [])})
        split = bool(self.manifest.lineage) and self.manifest.lineage[-1].config.get("head") == "split"
        inputs = "A32" if self.weight_only else "A8"
        return f"W{'/'.join(bits)}{inputs}{', split head' if split else ''}"


Value = Callable[[Row], float | None]


def quality(metric: str) -> Value:
    """Return a function that reads one quality metric from a row."""
    return lambda row: row.quality.get(metric)


def rows_of(runs: Sequence[Run]) -> list[Row]:
    """Return every artifact of every run. A name that several runs use is written ``run/name``.

    Values that a later run measured on another split have the split in their name, as they do within one run.
    """
    uses = Counter(record.name for run in runs for record in run.records)
    splits: dict[str, str] = {}
    return [
        Row(
            label=record.name if uses[record.name] == 1 else f"{run.name}/{record.name}",
            run=run,
            record=_with_splits(record, splits),
            manifest=run.manifest(record.name),
        )
        for run in runs
        for record in run.records
    ]


def _with_splits(record: Record, splits: dict[str, str]) -> Record:
    """Return a copy of the record in which values name their split if earlier values (``splits``) used another one."""
    conditions = record.conditions if isinstance(record.conditions, dict) else {}
    ways: dict[str, str] = {}
    for key, how in conditions.items():
        kind, way = name_and_way(key)
        split = how.get("split") if kind == "quality" and isinstance(how, dict) else None
        if split and splits.setdefault(way, split) != split:
            ways[way] = ", ".join(filter(None, [f"split {split.removeprefix('data.')}", way]))

    def renamed(key: str) -> str:
        name, way = name_and_way(key)
        return f"{name} ({ways[way]})" if way in ways else key

    figures = {renamed(key): value for key, value in record.quality.items()}
    renamed_conditions = {
        renamed(key) if name_and_way(key)[0] == "quality" else key: how for key, how in conditions.items()
    }
    return record.model_copy(update={"quality": figures, "conditions": renamed_conditions}) if ways else record


def figures_of(rows: Iterable[Row]) -> dict[str, Figure]:
    """Return a dict from each quality value that some artifact has to its declaration."""
    return scored(row.record for row in rows)


def reference(rows: Iterable[Row], row: Row, value: Value) -> Row | None:
    """Return the uncompressed artifact of the run to compare ``row`` with, in the same runtime if there is one."""
    plain = [other for other in rows if other.plain and other.run is row.run and value(other) is not None]
    same_runtime = [other for other in plain if other.onnx == row.onnx]
    return next(iter(same_runtime or plain), None)


def original(rows: Iterable[Row], row: Row, value: Value) -> Row | None:
    """Return the first uncompressed artifact of the run for which ``value`` was measured, in any runtime."""
    return next((o for o in rows if o.plain and o.run is row.run and value(o) is not None), None)


def change(rows: Iterable[Row], row: Row, metric: str) -> float | None:
    """Return the relative change of ``metric`` against the run's uncompressed model: 0.05 is 5 % more."""
    base = original(rows, row, quality(metric))
    if base is None or base is row or metric not in row.quality or not base.quality[metric]:
        return None
    return row.quality[metric] / base.quality[metric] - 1


def speedup(rows: Iterable[Row], row: Row) -> float | None:
    """Return the speedup of ``row`` over its reference per generated token, or None if its times are emulated."""
    base = reference(rows, row, lambda other: other.per_token)
    if base is None or base is row or row.emulated or not row.per_token or not base.per_token:
        return None
    return base.per_token / row.per_token


def unquantized(rows: Iterable[Row], row: Row) -> Row | None:
    """Return the timed float export of the run with as many parameters as ``row``. If there is none, its reference."""
    rows, size = list(rows), row.record.parameters
    floats = (o for o in rows if o.run is row.run and o.onnx and o.manifest.quantization is None and o.per_token)
    same_size = (other for other in floats if size is not None and other.record.parameters == size)
    return next(same_size, None) or reference(rows, row, lambda other: other.per_token)


def exports(rows: Sequence[Row]) -> list[Row]:
    """Return the exports of runs that timed both float and quantized ones. A run's first float export comes first."""
    found: list[Row] = []
    for run in {id(row.run): row.run for row in rows}.values():
        timed = [row for row in rows if row.run is run and row.onnx and row.record.speed.timed]
        floats = [row for row in timed if row.manifest.quantization is None]
        if floats and len(floats) < len(timed):
            found += [floats[0], *(row for row in timed if row is not floats[0])]
    return found


def smallest(rows: Iterable[Row]) -> Row | None:
    """Return the smallest of the compressed artifacts with the most complete measurements."""

    def order(row: Row) -> tuple[int, float]:
        return -bool(row.quality) - bool(row.per_token and not row.emulated), row.megabytes or float("inf")

    return min((row for row in rows if not row.plain and row.megabytes), key=order, default=None)


def front(points: Sequence[tuple[float, float]], *, lower_is_better: bool = True) -> list[tuple[float, float]]:
    """Return the points that no other point beats on both coordinates, sorted by the first (lower is better)."""
    sign = 1 if lower_is_better else -1
    best: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (point[0], sign * point[1])):
        if not best or sign * y < sign * best[-1][1]:
            best.append((x, y))
    return best
