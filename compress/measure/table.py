"""The table of measured values for the terminal and notebooks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table


def table(*columns: str, right: Sequence[str] = ()) -> Table:
    """An empty table in the common style. ``right`` names the columns that are aligned to the right (numbers)."""
    empty = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold", show_edge=False)
    for column in columns:
        empty.add_column(column, justify="right" if column in right else "left", no_wrap=column in ("name", *right))
    return empty


def records_table(records: Sequence[Mapping[str, Any]]) -> Table:
    """The measured values, one line per artifact. Columns without a value are omitted."""
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
    """The columns that exist only if models were timed relative to the first one."""
    if "faster" not in speed:
        return {}
    return {
        "prefill": f"{speed['faster']['prefill']:.2f}x",
        "per token": f"{speed['faster']['per_token']:.2f}x",
        "MB/token": f"{speed['weight_bytes_per_token'] / 2**20:,.2f}",
        "floor ms": f"{speed['floor_ms']:.2f}",
        "above": f"{speed['above_floor']:.1f}x",
    }
