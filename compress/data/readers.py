"""Read plain rows from a source with the ``datasets`` library. Files need no network, and its cache is not used."""

from __future__ import annotations

import csv
import gzip
import string
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import datasets
from datasets.exceptions import DatasetGenerationError

from compress.data.sources import ParallelText, Source
from compress.errors import DataError

_NO_ROWS = ("corresponds to no data", "BatchSize must be greater than 0", "at least one example")
"""Messages of the ``datasets`` library about JSON, Parquet and text files without rows."""


class TextPair(NamedTuple):
    """A prompt or source, and its reference responses. Training uses the first."""

    text: str
    references: tuple[str, ...]


class TokenRow(NamedTuple):
    """Token ids of one row. ``labels`` is None where the ids are also the labels."""

    input_ids: list[int]
    labels: list[int] | None


def read_text(source: Source, base: Path) -> list[str]:
    """Return running text: one piece per line of a file or row of a table, without its final newline."""
    column = "text" if source.text is not None else source.column or "text"
    pieces = [piece.removesuffix("\n") for piece in _texts(_table(source, base), column)]
    if not source.strip:
        return pieces
    return ["\n".join(line.strip() for line in piece.split("\n")) for piece in pieces]


def read_pairs(source: Source, base: Path) -> list[TextPair]:
    """Return prompts with responses, or sources with targets."""
    if isinstance(source.text, ParallelText):
        return _parallel(source, source.text, base)
    table = _table(source, base)
    if source.prompt:
        inputs, responses = _filled(table, source.prompt, "\n"), source.response
    else:
        inputs, responses = _filled(table, source.source or "", ""), source.target
    references = _references(table, responses or ())
    return [TextPair(*pair) for pair in zip(inputs, references, strict=True)]


def read_tokens(source: Source, base: Path) -> list[TokenRow]:
    """Return rows of token ids. Raises DataError for an empty row."""
    table = _table(source, base)
    ids = _ids(table, source.input_ids or "")
    labels = _ids(table, source.labels) if source.labels else [None] * len(ids)
    for row, (one, other) in enumerate(zip(ids, labels, strict=True)):
        if not one:
            raise DataError(f"row {row}: {source.input_ids!r} is empty")
        if other == []:
            raise DataError(f"row {row}: {source.labels!r} is empty")
    return [TokenRow(one, other) for one, other in zip(ids, labels, strict=True)]


def _table(source: Source, base: Path) -> datasets.Dataset:
    """Read the rows that remain after ``skip`` and ``limit``."""
    with _quiet():
        if source.hub is not None:
            table = _from_hub(source)
        else:
            table = _from_files(source.kind, [_existing(base, name) for name in source.files])
    stop = len(table) if source.limit is None else min(len(table), source.skip + source.limit)
    if source.skip >= stop:
        raise DataError(f"there are {len(table)} rows, and skip: {source.skip} leaves none")
    return table.flatten().select(range(source.skip, stop))  # a field of a nested column is a column: "pair.source"


def _existing(base: Path, name: str) -> Path:
    path = base / Path(name).expanduser()
    if not path.is_file():
        raise DataError(f"there is no file {path}")
    if _is_empty(path):
        raise DataError(f"{path} is empty")
    return path


def _is_empty(path: Path) -> bool:
    if path.suffix != ".gz":
        return not path.stat().st_size
    try:
        with gzip.open(path) as file:
            return not file.read(1)
    except (OSError, EOFError):  # reported when the file is read
        return False


def _from_files(kind: str, paths: list[Path]) -> datasets.Dataset:
    files = [str(path) for path in paths]
    try:
        if kind == "csv":
            return datasets.Dataset.from_list([row for path in paths for row in _csv_rows(path)])
        options = {"encoding": "utf-8-sig"} if kind == "text" else {}  # a byte order mark is not text
        with TemporaryDirectory() as cache:
            return datasets.load_dataset(
                kind, data_files=files, split="train", cache_dir=cache, keep_in_memory=True, **options
            )
    except (DatasetGenerationError, ValueError, OSError, EOFError, csv.Error) as error:
        reason = _reason(error)
        if any(text in reason for text in _NO_ROWS):
            raise DataError(f"{', '.join(files)} has no rows") from None
        raise DataError(f"cannot read {', '.join(files)} as {kind}: {reason}") from error


def _csv_rows(path: Path) -> list[dict[str, str]]:
    """Return every cell as text. Numbers are not converted, and NA is an ordinary word."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8-sig") as file:  # a byte order mark does not belong to the first column name
        table = csv.reader(file, delimiter="\t" if ".tsv" in path.suffixes else ",", strict=True)
        header = next(table, [])
        rows = [row for row in table if row]
    for number, row in enumerate(rows):
        if len(row) != len(header):
            raise ValueError(f"row {number} has {len(row)} cells, but the header has {len(header)}")
    return [dict(zip(header, row, strict=True)) for row in rows]


def _from_hub(source: Source) -> datasets.Dataset:
    try:
        return datasets.load_dataset(source.hub, source.config, split=source.split)
    except (
        OSError,
        ValueError,
        RuntimeError,
    ) as error:  # a lost connection, an unknown name, a dataset that is a script
        raise DataError(
            f"cannot load {source.hub!r} from the hub: {_reason(error)}; "
            "without network access, use a local copy (json, csv, parquet or text)"
        ) from error


def _reason(error: BaseException) -> str:
    cause = error.__cause__ or error
    return next(iter(str(cause).splitlines()), type(cause).__name__)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the progress bars and log lines of ``datasets``, and restore the user's settings afterwards."""
    shown, verbosity = not datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if shown:
            datasets.enable_progress_bars()


def _column(table: datasets.Dataset, name: str) -> list[Any]:
    if name not in table.column_names:
        raise DataError(f"no column {name!r}; allowed: {', '.join(table.column_names)}")
    return list(table[name])


def _texts(table: datasets.Dataset, name: str) -> list[str]:
    return [_text(cell, row, name) for row, cell in enumerate(_column(table, name))]


def _text(cell: Any, row: int, name: str) -> str:
    if isinstance(cell, int | float):
        return str(cell)
    if not isinstance(cell, str):
        kind = "nothing" if cell is None else type(cell).__name__
        raise DataError(f"row {row}: column {name!r} contains {kind}, not text")
    return cell


def _references(table: datasets.Dataset, names: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the references of each row, from several columns and from cells with lists. Nulls are skipped."""
    found = []
    for row, cells in enumerate(zip(*(_column(table, name) for name in names), strict=True)):
        lists = [cell if isinstance(cell, list) else [cell] for cell in cells]
        given = [(name, text) for name, texts in zip(names, lists, strict=True) for text in texts if text is not None]
        if not given:
            _text(None, row, " and ".join(names))
        found.append(_meant([_text(text, row, name) for name, text in given]))
    return found


def _meant(texts: Sequence[str]) -> tuple[str, ...]:
    """Drop empty references, unless all are empty: then one empty reference remains."""
    return tuple(text for text in texts if text.strip()) or (texts[0],)


def _filled(table: datasets.Dataset, template: str, ending: str) -> list[str]:
    """Fill the ``{column}`` fields of a template in each row. A template without fields is a column name."""
    try:
        fields = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise DataError(f"{template!r} is not a valid template: {error}") from error
    if not fields:
        return [text + ending for text in _texts(table, template)]
    columns = {name: ["" if cell is None else cell for cell in _column(table, name)] for name in set(fields)}
    try:
        return [
            _Whole().vformat(template, (), {name: cells[row] for name, cells in columns.items()})
            for row in range(len(table))
        ]
    except (ValueError, TypeError) as error:
        raise DataError(f"{template!r} does not match the columns: {error}") from error


class _Whole(string.Formatter):
    """A formatter that reads a whole field, including dots, as one column name."""

    def get_field(self, field_name: str, args: Any, kwargs: Any) -> tuple[Any, str]:
        return kwargs[field_name], field_name


def _parallel(source: Source, files: ParallelText, base: Path) -> list[TextPair]:
    rows = source.model_copy(update={"skip": 0, "limit": None})
    names = (files.source, *files.target)
    columns = [read_text(rows.model_copy(update={"text": (name,)}), base) for name in names]
    for name, lines in zip(names, columns, strict=True):
        if len(lines) != len(columns[0]):
            raise DataError(f"{names[0]} has {len(columns[0])} lines and {name} has {len(lines)}")
    stop = None if source.limit is None else source.skip + source.limit
    pairs = [TextPair(text, _meant(responses)) for text, *responses in zip(*columns, strict=True)][source.skip : stop]
    if not pairs:
        raise DataError(f"there are {len(columns[0])} rows, and skip: {source.skip} leaves none")
    return pairs


def _ids(table: datasets.Dataset, name: str) -> list[list[int]]:
    rows = _column(table, name)
    for row, cell in enumerate(rows):
        if not isinstance(cell, list):
            raise DataError(f"row {row}: column {name!r} contains {type(cell).__name__}, not a list of token ids")
    if wrong := [(row, token) for row, cell in enumerate(rows) for token in cell if type(token) is not int]:
        # one fraction turns a whole column into floats: report the fraction itself where there is one
        row, token = next((found for found in wrong if not _is_whole(found[1])), wrong[0])
        raise DataError(f"row {row}: column {name!r} contains {token!r}, which is not a token id")
    return rows


def _is_whole(token: Any) -> bool:
    return isinstance(token, float) and token.is_integer()
