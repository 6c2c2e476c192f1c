"""Generated text beside its input: the rows that a report shows, and the text of each artifact for them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from statistics import fmean
from typing import Any

from compress.measure.figures import name_and_way
from compress.report.numbers import Row

FIRST = 3
"""Number of first rows, which are always shown."""
DIFFERING = 3
"""Number of further rows: those whose texts differ most from the first artifact's text."""


@dataclass(frozen=True)
class Example:
    """One row: its input, its references, and the text of each artifact by name, in the order of the report."""

    title: str
    input: str
    references: tuple[str, ...]
    outputs: dict[str, str] = field(default_factory=dict)

    @property
    def lines(self) -> list[tuple[str, str]]:
        """Pairs (label, text): input, references, then each distinct text with all artifacts that wrote it."""
        several = len(self.references) > 1
        given = [(f"reference {at}" if several else "reference", text) for at, text in enumerate(self.references, 1)]
        names: dict[str, list[str]] = {}
        for name, text in self.outputs.items():
            names.setdefault(text, []).append(name)
        return [("input", self.input), *given, *((", ".join(found), text) for text, found in names.items())]

    def difference(self, names: Sequence[str]) -> float:
        """Return how much the other texts differ from that of the first name: 0 if equal, 1 without a common word.

        The result is the mean over the other names, and 0 if there are none.
        """
        first, *others = [self.outputs[name].split() for name in names] or [[]]
        unlike = [1 - SequenceMatcher(None, first, other, autojunk=False).ratio() for other in others]
        return fmean(unlike) if unlike else 0.0


def examples(rows: Sequence[Row]) -> list[Example]:
    """Return the examples that a report shows: the first rows, and then those on which the artifacts differ most.

    Artifacts that generated for the same rows are shown together. Runs on other rows get separate examples.
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
    # an artifact that wrote one text for all rows is left out of the comparison
    telling = [name for name in found[0].outputs if len({example.outputs[name] for example in found}) > 1]
    ranked = sorted(((-example.difference(telling), at) for at, example in enumerate(found[FIRST:], FIRST)))
    return [*found[:FIRST], *(found[at] for difference, at in ranked[:DIFFERING] if difference)]


def _kept(rows: Sequence[Row]) -> list[Example]:
    """Return every kept row once, with all texts generated for it."""
    found: dict[tuple[object, ...], Example] = {}
    for row in rows:
        for label, sample in _samples(row):
            given = str(sample.get("input", "")), _references(sample)
            title = f"row {sample['row']}" if "row" in sample else ""
            example = found.setdefault((title, *given), Example(title, *given))
            example.outputs[label] = str(sample.get("output", ""))
    return list(found.values())


def _references(sample: dict[str, Any]) -> tuple[str, ...]:
    """Return all references. Records of older versions have only the first one."""
    one = sample.get("reference")
    return tuple(map(str, sample.get("references", [one] if one else [])))


def _samples(row: Row) -> Iterator[tuple[str, dict[str, Any]]]:
    for key, found in row.record.quality.items():
        name, way = name_and_way(key)
        if name == "samples":
            how = ", ".join(filter(None, [way, _seed(row, key.replace("samples", "quality", 1))]))
            yield from ((f"{row.label} ({how})" if how else row.label, sample) for sample in found)


def _seed(row: Row, key: str) -> str:
    """Return the seed of sampled text. If there were several seeds, the last one's text is kept."""
    conditions = row.record.conditions if isinstance(row.record.conditions, dict) else {}
    decoding = conditions.get(key, {}).get("decoding", {})
    return f"seed {decoding['seeds'][-1]}" if decoding.get("do_sample") and decoding.get("seeds") else ""
