"""The table of what was measured, as the terminal and notebooks show it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table


def table(*columns: str, right: Sequence[str] = ()) -> Table:
    """An empty table in the one style of this command; ``right`` names the columns of numbers."""
    empty = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold", show_edge=False)
    for column in columns:
        empty.add_column(column, justify="right" if column in right else "left", no_wrap=column in ("name", *right))
    return empty


def records_table(records: Sequence[Mapping[str, Any]]) -> Table:
    """What was measured, a line per artifact; columns that nothing filled are left out."""
    rows = [_cells(record) for record in records]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    shown = table(*columns, right=columns[1:])
    for row in rows:
        shown.add_row(*(row.get(column, "") for column in columns))
    return shown


def _cells(record: Mapping[str, Any]) -> dict[str, str]:
    cells = {"name": f"[bold]{record['name']}[/bold]"}
    if "parameters" in record:
        cells |= {
            "parameters": f"{record['parameters']:,}",
            "MB": f"{record['bytes'] / 2**20:,.2f}",
            "smaller": f"{record['compression_ratio']:.1f}x",
        }
    for name, value in record.get("quality", {}).items():
        if isinstance(value, float) and not name.startswith(("bits_", "reference_")):
            cells[name.replace("_", " ")] = f"{value:,.2f}" if 0.1 <= abs(value) < 1e9 else f"{value:.2g}"
    speed = record.get("speed")
    if speed:
        cells |= {
            "prefill ms": f"{speed['prefill_ms']['p50']:.2f}",
            "ms/token p50": f"{speed['per_token_ms']['p50']:.2f}",
            "p95": f"{speed['per_token_ms']['p95']:.2f}",
            "tokens/s": f"{speed['tokens_per_s']:,.1f}",
        }
        cells |= _comparison(speed)
    return cells


def _comparison(speed: Mapping[str, Any]) -> dict[str, str]:
    """What stands only where models were timed against the first of them."""
    if "faster" not in speed:
        return {}
    return {
        "prefill": f"{speed['faster']['prefill']:.2f}x",
        "per token": f"{speed['faster']['per_token']:.2f}x",
        "MB/token": f"{speed['weight_bytes_per_token'] / 2**20:,.2f}",
        "floor ms": f"{speed['floor_ms']:.2f}",
        "above": f"{speed['above_floor']:.1f}x",
    }
