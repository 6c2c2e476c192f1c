"""A metric: one function, and the label, direction and order of each value that it returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from compress.schema import Strict

Better = Literal["higher", "lower"]


class Figure(Strict):
    """How tables, plots and sentences show one value of a metric."""

    label: str = ""
    """The name that readers see. By default the key, with blanks for underscores."""
    better: Better | None = None
    """Whether lower or higher is better; None for a value without a direction, such as a length."""
    order: int = 80
    """The place among the columns. The first value also appears in the headline and in the plots."""
    detail: bool = False
    """Whether the table in the terminal leaves it out."""
    condition: bool = False
    """Whether it says how or on what data the model was measured. No table shows it; the report's conditions do."""


@dataclass(frozen=True)
class Metric:
    """A function, the values it returns, and the input that it needs.

    Args:
        function: if it reads texts, ``function(texts, references, **taken)``, where ``references`` holds one or several
            texts for each text. If it reads logits, ``function(subject, split, batch, advance, **taken)``: a
            :class:`~compress.generation.subject.Subject`, a :class:`~compress.data.Split`, the rows per batch, and a
            function to call with the number of rows of each finished batch. It returns its figures by key, and may add
            a text ``signature`` that says how they were computed. The first sentence of its docstring describes the
            metric.
        figures: what each figure is, by key.
        reads: what the function reads: generated texts, or logits.
        takes: names of further arguments of the function: fields of ``quality``; ``full``, for each text whether it has
            all tokens it may have; ``reference``, the model to compare with.
        problem: why these references, of a split with this name, cannot be scored; None if they can.
        version: part of the cache key of results. Increase it when the figures change.
    """

    function: Callable[..., Mapping[str, Any]]
    figures: Mapping[str, Figure] = field(default_factory=dict)
    reads: Literal["text", "logits"] = "text"
    takes: tuple[str, ...] = ()
    problem: Callable[[Sequence[Sequence[str]], str], str | None] = lambda references, name: None
    version: int = 1
