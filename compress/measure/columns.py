"""The table of measurements as rows of text. The report and the terminal lay out the same columns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from compress.measure import formats
from compress.measure.figures import name_and_way, name_of
from compress.measure.record import Record, Speed, scored


class Labelled(Protocol):
    """The source of a row of a table."""

    @property
    def label(self) -> str:
        """The name of the row."""
        ...


Row = TypeVar("Row", bound=Labelled)


@dataclass(frozen=True)
class Column(Generic[Row]):
    """A column: its title, a unit or remark, and the text of a row. An empty text stands for what was not measured."""

    title: str
    unit: str
    cell: Callable[[Row], str]
    detail: bool = False
    """Whether the table in the terminal leaves it out."""


@dataclass(frozen=True)
class Table:
    """Column titles, each with a unit or remark, and rows of text. The first column names the row."""

    titles: list[tuple[str, str]]
    lines: list[list[str]]


@dataclass(frozen=True)
class Measured:
    """An artifact with its measurements, and how it compares with another one."""

    label: str
    record: Record
    change: float | None = None
    """Relative change of the first metric value against the uncompressed model: 0.05 is 5 % more."""
    faster: float | None = None
    """How many times as fast per token it is as the artifact that it is compared with."""


def laid_out(rows: Sequence[Row], columns: Iterable[Column[Row]]) -> Table:
    """Return one line per row. Columns without any text are left out; without any column there is no line."""
    written = [(column.title, column.unit, [column.cell(row) for row in rows]) for column in columns]
    filled = [column for column in written if any(column[2])]
    return Table(
        titles=[("artifact", ""), *((title, unit) for title, unit, _ in filled)],
        lines=[[row.label, *(cells[at] or "–" for _, _, cells in filled)] for at, row in enumerate(rows) if filled],
    )


def columns(rows: Sequence[Measured]) -> Iterator[Column[Measured]]:
    """Yield every column of the table of measurements."""
    yield Column("parameters", "", lambda row: formats.count(row.record.parameters))
    yield Column("size", "MB", lambda row: formats.megabytes(row.record.bytes))
    yield Column("smaller", "than fp32 / fp16", _ratios)
    yield from _of_quality(rows)
    yield from _of_speed()


def _of_quality(rows: Sequence[Measured]) -> Iterator[Column[Measured]]:
    figures = scored(row.record for row in rows)
    for at, (key, figure) in enumerate(figures.items()):
        yield Column(figure.label, name_and_way(key)[1], _score(key), detail=figure.detail)
        if at == 0:
            yield Column("change", f"of {name_of(key, figures)}", lambda row: formats.percent(row.change))


def _score(key: str) -> Callable[[Measured], str]:
    """Return a function from a row to the text of one value of ``quality``."""
    return lambda row: formats.number(row.record.scores.get(key))


def _of_speed() -> Iterator[Column[Measured]]:
    yield Column("per token", "ms, p50 / p95", lambda row: formats.percentiles(row.record.speed.per_token_ms))
    yield Column("faster", "per token", lambda row: formats.ratio(row.faster))
    yield Column("prefill", "ms, p50 / p95", lambda row: formats.percentiles(row.record.speed.prefill_ms))
    yield Column("faster", "prefill", lambda row: formats.ratio(row.record.speed.faster.get("prefill")))
    yield Column("throughput", "tokens/s", lambda row: formats.number(row.record.speed.tokens_per_s))
    yield Column("weights", "MB per token", _beside(lambda speed: formats.megabytes(speed.weight_bytes_per_token)))
    yield Column("floor", "ms per token", _beside(lambda speed: formats.number(speed.floor_ms)))
    yield Column("above floor", "per token", lambda row: formats.ratio(row.record.speed.above_floor))
    yield Column("load", "s", lambda row: formats.number(row.record.speed.load_s), detail=True)
    yield Column("peak memory", "MB", lambda row: formats.megabytes(row.record.speed.peak_rss_bytes), detail=True)


def _ratios(row: Measured) -> str:
    found = (row.record.compression_ratio, row.record.compression_ratio_fp16)
    return " / ".join(formats.ratio(value) for value in found if value is not None)


def _beside(cell: Callable[[Speed], str]) -> Callable[[Measured], str]:
    """Return ``cell`` for artifacts that were timed together with a first one, and an empty text for others."""
    return lambda row: cell(row.record.speed) if row.record.speed.faster else ""
