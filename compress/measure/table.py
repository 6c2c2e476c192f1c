"""Tables for the terminal and notebooks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from compress.measure.columns import Measured, columns, laid_out
from compress.measure.record import Record


def table(*columns: str, right: Sequence[str] = ()) -> Table:
    """Return an empty table in the common style. ``right`` names the columns of numbers, which are right-aligned."""
    empty = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold", show_edge=False)
    for column in columns:
        empty.add_column(column, justify="right" if column in right else "left", no_wrap=column in ("name", *right))
    return empty


def records_table(records: Sequence[Mapping[str, Any]]) -> Table:
    """Return the measured values, one line per artifact: the columns of the report, without its details.

    Changes of quality are only in the report. The columns that matter most come first.
    """
    read = [Record.model_validate(record) for record in records]
    rows = [Measured(record.name, record, faster=record.speed.faster.get("per_token")) for record in read]
    found = laid_out(rows, (column for column in columns(rows) if not column.detail))
    shown = table()
    shown.add_column("name\n", no_wrap=True)  # titles are in the first line, units in the second
    for title, unit in found.titles[1:]:
        shown.add_column(Text.assemble(title, "\n", (unit, "not bold dim")), justify="right", no_wrap=True)
    for label, *cells in found.lines or [[row.label] for row in rows]:
        shown.add_row(Text(label, style="bold"), *cells)
    return shown


def fit(shown: Table, screen: Console) -> int:
    """Remove columns from the right until a table fits the screen. Return how many; the first two always stay."""
    columns = len(shown.columns)
    while len(shown.columns) > 2 and width(shown, screen) > screen.width:
        shown.columns.pop()
    return columns - len(shown.columns)


def width(shown: Table, screen: Console) -> int:
    """Return the width of a table that is neither cut nor wrapped."""
    return shown.__rich_measure__(screen, screen.options.update(max_width=10_000)).maximum
