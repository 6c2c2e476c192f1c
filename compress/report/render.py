"""Write a report: Markdown, JSON and one self-contained HTML page."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from compress.errors import UserError
from compress.report import plots, sections, words
from compress.report.examples import DIFFERING, FIRST, examples
from compress.report.numbers import Row, rows_of
from compress.report.read import Run, Stage, read
from compress.report.units import kept_units

KEPT = "Kept units: filled cells are kept; a shaded cell stands for neighbouring units of which some are kept."
EXAMPLES = (
    f"The first {FIRST} of the recorded rows (evenly spread), then up to {DIFFERING} rows on which the texts differ "
    "most from the first text on average, word by word. Artifacts with the same text on every row do not count there. "
    "The decoding is listed under Conditions. Sampled text shows its seed; with several seeds, the last one."
)
CLIPPED = "Weights of some matrices; dashed lines mark where the quantizer clips them."


@dataclass(frozen=True)
class Figure:
    """An SVG, or None if there was nothing to draw, with a sentence that says what it shows."""

    svg: str | None
    caption: str
    wide: bool = False


@dataclass(frozen=True)
class Chapter:
    """The figures of one stage."""

    name: str
    type: str
    figures: list[Figure]


def build(workdirs: Sequence[Path], out: Path) -> None:
    """Write ``report.md``, ``report.json`` and ``report.html`` into ``out``. Several work directories are compared.

    Raises:
        UserError: no directory was given, or one of them is not a work directory.
    """
    if not workdirs:
        raise UserError("report: no work directory given; name at least one that `compress-lm run` wrote")
    runs = [read(Path(workdir)) for workdir in workdirs]
    rows = rows_of(runs)
    page = _page(runs, rows)
    out.mkdir(parents=True, exist_ok=True)
    _write(out / "report.json", json.dumps(_data(runs, rows, page), indent=2, ensure_ascii=False) + "\n")
    _write(out / "report.md", _template("report.md.j2").render(page))
    _write(out / "report.html", _template("report.html.j2").render({**page, **_figures(runs, rows)}))


def _page(runs: Sequence[Run], rows: Sequence[Row]) -> dict[str, Any]:
    titles = [run.title for run in runs]
    names = [
        title if titles.count(title) == 1 else f"{title} in {run.name}" for title, run in zip(titles, runs, strict=True)
    ]
    of_run = [(name, [row for row in rows if row.run is run]) for name, run in zip(names, runs, strict=True)]
    return {
        "title": " and ".join(dict.fromkeys(titles)),
        "headlines": [(name, words.headline(found), sections.tiles(found)) for name, found in of_run],
        "warnings": words.warnings(runs, rows),
        "table": sections.measured(rows),
        "exports": sections.exports(rows),
        "stages": sections.stages(runs),
        "conditions": sections.conditions(rows),
        "environment": sections.environment(runs),
        "not_measured": words.not_measured(rows),
        "examples": examples(rows),
        "examples_remark": EXAMPLES,
        "lineage": sections.lineage(rows),
    }


def _figures(runs: Sequence[Run], rows: Sequence[Row]) -> dict[str, Any]:
    trade_offs = [
        Figure(plots.size_against_quality(rows), "Size against quality."),
        Figure(plots.latency_against_quality(rows), "Time for one new token against quality."),
    ]
    return {"trade_offs": _drawn(trade_offs), "chapters": [c for run in runs for c in _chapters(run, len(runs) > 1)]}


def _chapters(run: Run, several: bool) -> list[Chapter]:
    chapters = []
    for stage in run.stages:
        name = f"{run.name}/{stage.entry.name}" if several else stage.entry.name
        cut = stage.entry.type == "prune"
        figures = [
            Figure(plots.losses(name, stage), _of_losses(stage)),
            Figure(plots.evaluations(name, stage), _of_evaluations(stage)),
            Figure(kept_units(name, stage.manifest) if cut else None, KEPT, wide=True),
            Figure(plots.histograms(name, stage), CLIPPED, wide=True),
        ]
        chapters.append(Chapter(name, stage.entry.type, _drawn(figures)))
    return [chapter for chapter in chapters if chapter.figures]


def _of_losses(stage: Stage) -> str:
    several = any(len(line.get("terms", {})) > 1 for line in stage.history)
    return "The training loss and its weighted terms, which add up to it." if several else "The training loss."


def _of_evaluations(stage: Stage) -> str:
    settings = (stage.step.config.get("train") if stage.step else None) or {}
    if stage.entry.type == "learn_masks" or settings.get("keep") == "last":
        return "The loss on held-out text; the weights of the last step were kept."
    return "The loss on held-out text, which chose the checkpoint."


def _drawn(figures: Sequence[Figure]) -> list[Figure]:
    return [figure for figure in figures if figure.svg is not None]


def _data(runs: Sequence[Run], rows: Sequence[Row], page: dict[str, Any]) -> dict[str, Any]:
    return {
        "artifacts": [_record(row) for row in rows],
        "environment": runs[0].environment,
        "title": page["title"],
        "headlines": [sentence for _, sentence, _ in page["headlines"]],
        "warnings": page["warnings"],
        "not_measured": page["not_measured"],
        "runs": [run.file.model_dump(mode="json") | {"name": run.name} for run in runs],
    }


def _record(row: Row) -> dict[str, Any]:
    step = row.manifest.lineage[-1] if row.manifest.lineage else None
    coverage = step.coverage.model_dump(exclude_none=True) if step and step.coverage else {}
    return row.record.model_dump(exclude_unset=True) | {"name": row.label, "coverage": coverage}


def _template(name: str) -> Any:
    environment = Environment(
        loader=PackageLoader("compress.report"),
        autoescape=name.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["cell"] = _cell
    environment.filters["verbatim"] = _verbatim
    return environment.get_template(name)


def _cell(text: str) -> str:
    """Escape text for a Markdown table."""
    return text.replace("|", "\\|").replace("\n", " ")


def _verbatim(text: str, longest: int | None = None) -> str:
    """Return text that a Markdown table shows unchanged. If longer than ``longest``, it is cut after a word."""
    text = text.strip()
    if longest is not None and len(text) > longest:
        text = f"{text[:longest].rsplit(maxsplit=1)[0]} […]"
    escaped = re.sub(r"([\\`*_\[\]<>|~&$])", r"\\\1", text)
    return re.sub(r"\s*\n\s*", "<br>", escaped)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
