"""Generated text beside what it was made from: which rows a report shows, and what each artifact wrote for them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from statistics import fmean
from typing import Any

from compress.report.numbers import Row, name_and_way

FIRST = 3
"""Rows shown whatever they hold."""
DIFFERING = 3
"""Rows shown besides: those on which texts are least like the first one."""


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

    def difference(self, names: Sequence[str]) -> float:
        """How unlike the text of the first name those of the others are, word by word: 0 the same, 1 nothing in common.

        Their mean counts; without others it is 0.
        """
        first, *others = [self.outputs[name].split() for name in names] or [[]]
        unlike = [1 - SequenceMatcher(None, first, other, autojunk=False).ratio() for other in others]
        return fmean(unlike) if unlike else 0.0


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
    # who says the same on every row differs from the others by what they say
    telling = [name for name in found[0].outputs if len({example.outputs[name] for example in found}) > 1]
    ranked = sorted(((-example.difference(telling), at) for at, example in enumerate(found[FIRST:], FIRST)))
    return [*found[:FIRST], *(found[at] for difference, at in ranked[:DIFFERING] if difference)]


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
            how = ", ".join(filter(None, [way, _seed(row, key.replace("samples", "quality", 1))]))
            yield from ((f"{row.label} ({how})" if how else row.label, sample) for sample in found)


def _seed(row: Row, key: str) -> str:
    """The seed of text that was drawn: of several the last one's is kept."""
    conditions = row.record.conditions if isinstance(row.record.conditions, dict) else {}
    decoding = conditions.get(key, {}).get("decoding", {})
    return f"seed {decoding['seeds'][-1]}" if decoding.get("do_sample") and decoding.get("seeds") else ""
