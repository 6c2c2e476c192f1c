"""Generated text beside what it was made from: which rows a report shows, and what each artifact wrote for them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from typing import Any

from compress.report.numbers import Row, name_and_way

FIRST = 3
"""Rows shown whatever they hold."""
DIFFERING = 3
"""Rows shown besides: those on which some text is least like the first one."""


@dataclass(frozen=True)
class Example:
    """One row: its input, its references, and the text of each artifact by name, in the order of the report."""

    title: str
    input: str
    references: tuple[str, ...]
    outputs: dict[str, str] = field(default_factory=dict)

    @property
    def lines(self) -> list[tuple[str, str]]:
        """(what it is, text): input, references, then each text once, with the names of all that wrote it."""
        several = len(self.references) > 1
        given = [(f"reference {at}" if several else "reference", text) for at, text in enumerate(self.references, 1)]
        names: dict[str, list[str]] = {}
        for name, text in self.outputs.items():
            names.setdefault(text, []).append(name)
        return [("input", self.input), *given, *((", ".join(found), text) for text, found in names.items())]

    @property
    def difference(self) -> float:
        """How unlike the first text the least like it is, word by word: 0 for the same words, 1 for none in common."""
        first, *others = [text.split() for text in self.outputs.values()]
        likeness = (SequenceMatcher(None, first, other, autojunk=False).ratio() for other in others)
        return 1 - min(likeness, default=1.0)


def examples(rows: Sequence[Row]) -> list[Example]:
    """What a report shows of the kept rows: the first ones, and then those on which the artifacts differ most.

    Artifacts that wrote on the same rows stand together; those of runs on other rows get examples of their own.
    """
    groups: dict[tuple[str, ...], list[Example]] = {}
    for example in _kept(rows):
        groups.setdefault(tuple(example.outputs), []).append(example)
    shown: set[str] = set()
    chosen: list[Example] = []
    for names, found in sorted(groups.items(), key=lambda group: -len(group[0])):
        if not shown.issuperset(names):
            chosen += _chosen(found)
            shown.update(names)
    return chosen


def _chosen(found: Sequence[Example]) -> list[Example]:
    rest = sorted(found[FIRST:], key=lambda example: -example.difference)
    return [*found[:FIRST], *(example for example in rest[:DIFFERING] if example.difference)]


def _kept(rows: Sequence[Row]) -> list[Example]:
    """Every kept row once, with all that was written for it."""
    found: dict[tuple[object, ...], Example] = {}
    for row in rows:
        for label, sample in _samples(row):
            given = str(sample.get("input", "")), _references(sample)
            title = f"row {sample['row']}" if "row" in sample else ""
            example = found.setdefault((title, *given), Example(title, *given))
            example.outputs[label] = str(sample.get("output", ""))
    return list(found.values())


def _references(sample: dict[str, Any]) -> tuple[str, ...]:
    """All references; records of older versions have the first alone."""
    one = sample.get("reference")
    return tuple(map(str, sample.get("references", [one] if one else [])))


def _samples(row: Row) -> Iterator[tuple[str, dict[str, Any]]]:
    for key, found in row.record.quality.items():
        name, way = name_and_way(key)
        if name == "samples":
            yield from ((f"{row.label} ({way})" if way else row.label, sample) for sample in found)
