"""Progress bars: for a training stage, with loss per term and tokens per second, and for work on rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

Advance = Callable[[int], None]
"""Called with the number of rows of each finished batch."""


class Meter:
    """A context manager around a training loop; draws on standard error.

    Without a terminal it writes one short line per evaluation. The loss terms are in ``history.jsonl``.
    """

    def __init__(self, name: str, total: int, done: int, *, shown: bool) -> None:
        self.console = Console(stderr=True, quiet=not shown)
        self.name, self.total, self.step = name, total, done
        self.loss = self.terms = self.evaluation = self.speed = ""
        self.rate = 0.0
        self.bar = _bar(self.console, shown=shown)
        self.task = self.bar.add_task(name, total=total, completed=done, text="")

    def __enter__(self) -> Meter:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def update(self, loss: float, terms: Mapping[str, float], rate: float) -> None:
        """Show that one step is done. ``rate`` is its tokens per second."""
        self.step += 1
        self.rate = rate if not self.rate else 0.9 * self.rate + 0.1 * rate
        self.loss, self.speed = f"loss {loss:.4f}", f"{self.rate:,.0f} tok/s"
        self.terms = "".join(f"  {name} {value:.4g}" for name, value in terms.items()) if len(terms) > 1 else ""
        self._draw(advance=1)

    def evaluated(self, nll: float) -> None:
        """Show the result of an evaluation."""
        self.evaluation = f"  eval {nll:.4f}"
        self._draw(advance=0)
        if self.bar.disable:
            line = f"{self.name} {self.step}/{self.total}  {self.loss}{self.evaluation}  {self.speed}"
            self.console.print(line, highlight=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """Write a warning on one line."""
        self.console.print(f"{self.name}: {text}", highlight=False, markup=False, soft_wrap=True)

    def _draw(self, *, advance: int) -> None:
        text = f"{self.loss}{self.terms}{self.evaluation}  {self.speed}"
        self.bar.update(self.task, advance=advance, text=text)


class RowMeter:
    """A context manager around work on batches of rows; draws on standard error.

    Without a terminal it writes one short line after each tenth of the rows, with the remaining time.
    """

    def __init__(self, name: str, total: int, done: int, *, shown: bool) -> None:
        self.console = Console(stderr=True, quiet=not shown)
        self.name, self.total, self.done, self.begun = name, total, done, done
        self.bar = _bar(self.console, shown=shown)
        self.task = self.bar.add_task(name, total=total, completed=done, text="")

    def __enter__(self) -> RowMeter:
        self.start = time.perf_counter()
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def advance(self, rows: int, text: str) -> None:
        """Show that ``rows`` more rows are done, with ``text`` beside the bar."""
        tenth, self.done = self.done * 10 // self.total, self.done + rows
        self.bar.update(self.task, advance=rows, text=text)
        if self.bar.disable and self.done * 10 // self.total > tenth:
            each = (time.perf_counter() - self.start) / (self.done - self.begun)
            left = duration(each * (self.total - self.done))
            line = f"{self.name} {self.done}/{self.total}  {text}  left {left}"
            self.console.print(line, highlight=False, soft_wrap=True)


@contextmanager
def counting(console: Console | None, name: str, total: int) -> Iterator[Callable[[int], None]]:
    """Draw a bar with the remaining time for ``total`` rows. Call the yielded function with the number of rows done.

    The bar is removed at the end. Without a console or a terminal nothing is written.
    """
    shown = console is not None and console.is_terminal
    with Progress(*_columns(), console=console or Console(quiet=True), disable=not shown, transient=True) as bar:
        task = bar.add_task(name, total=total)
        yield lambda rows: bar.advance(task, rows)


def _bar(console: Console, *, shown: bool) -> Progress:
    """Return a bar with a text at its end, shown only on a terminal."""
    text = TextColumn("{task.fields[text]}")
    return Progress(*_columns(), text, console=console, disable=not (shown and console.is_terminal))


def _columns() -> tuple[ProgressColumn, ...]:
    """Return the columns of every bar: name, finished share, elapsed time and remaining time."""
    ends = TextColumn("[bold]{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn()
    return *ends, TextColumn("left"), TimeRemainingColumn()


def duration(seconds: float) -> str:
    """Format a time: ``4.2 s``, ``3 min 20 s``, ``2 h 05 min``."""
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
