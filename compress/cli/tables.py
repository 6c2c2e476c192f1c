"""Tables on the terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table

from compress.measure.table import table
from compress.pipeline import Plan

_STATES = {"runs": "will run", "continued": "continues", "reused": "[green]reused[/green]", "built": "will be built"}


def plan_table(plan: Plan) -> Table:
    """Return what a run would do, one line per model and stage."""
    shown = table(
        "name", "stage", "from", "teacher", "steps", "traits", "parameters", "", right=("steps", "parameters")
    )
    for row in plan.rows:
        parameters = f"{row.parameters:,}" if row.parameters is not None else ""
        state = _STATES.get(row.state, row.state)
        shown.add_row(
            f"[bold]{row.name}[/bold]",
            row.type,
            row.source,
            row.teacher,
            row.steps,
            ", ".join(row.traits) + (f" ({row.note})" if row.note else ""),
            parameters,
            state,
        )
    return shown


def cut_rows(plan: Plan) -> Iterator[str]:
    """Yield one line per split with rows that were cut to fit or have no text. Models with the same rows share it."""
    models = plan.inputs.recipe.models
    views = {found.digest: found for name in models if (found := plan.inputs.data(name)) is not None}
    for data in views.values():
        for split in (data.train, data.eval, data.test):
            if split is not None and split.truncated:
                yield f"{split.name}: {split.truncated:,} of {len(split):,} rows were cut to fit"
            if split is not None and split.blank:
                yield f"{split.name}: {split.blank:,} of {len(split):,} rows have an empty input or target"
