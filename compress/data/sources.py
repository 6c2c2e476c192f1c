"""The ``data`` section of a recipe. This module reads no files."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import ConfigDict, Field, model_validator

from compress.schema import Several, Strict

Layout = Literal["text", "prompt", "pair", "tokens"]

_KINDS = ("text", "json", "csv", "parquet", "hub")
_LAYOUTS = {
    "text": ("column",),
    "prompt": ("prompt", "response"),
    "pair": ("source", "target"),
    "tokens": ("input_ids", "labels"),
}


class ParallelText(Strict):
    """Text files with parallel lines. Several targets are several references for each source line."""

    source: str
    target: Several[str]


class Source(Strict):
    """Where rows come from, and what their columns contain.

    The place is exactly one of ``text``, ``json``, ``csv``, ``parquet`` (one file or several, plain or ``.gz``,
    relative to the recipe) and ``hub`` (with ``split`` and optionally ``config``).

    The columns are one of: ``column`` (running text, by default the column ``text``), ``prompt`` and ``response`` (loss
    on the response), ``source`` and ``target``, or ``input_ids`` with optional ``labels``. A newline follows a prompt
    that is a bare column name. With several references, training uses the first and measurements compare with all.
    """

    model_config = ConfigDict(serialize_by_alias=True)

    text: Several[str] | ParallelText | None = None
    """Text files, or ``{source, target}``: files with parallel lines."""
    json_files: Several[str] | None = Field(default=None, alias="json")
    """JSON lines, or one JSON array."""
    csv: Several[str] | None = None
    """Comma-separated values with a header (tabs in a ``.tsv``); every cell is text."""
    parquet: Several[str] | None = None
    """Parquet files."""
    hub: str | None = None
    """Name of a data set on the Hugging Face hub."""
    config: str | None = None
    """Configuration of the hub data set."""
    split: str | None = None
    """Split of the hub data set."""
    column: str | None = None
    """Column of running text."""
    prompt: str | None = None
    """Column of prompts, or a text with ``{column}`` fields; not scored."""
    response: Several[str] | None = None
    """Column of responses; several columns, or a cell with a list, are several references."""
    source: str | None = None
    """Column of sources, or a text with ``{column}`` fields."""
    target: Several[str] | None = None
    """Column of targets; several columns, or a cell with a list, are several references."""
    input_ids: str | None = None
    """Column of token ids."""
    labels: str | None = None
    """Column of labels, not shifted, -100 for tokens without loss; by default the ids of a causal row."""
    strip: bool = False
    """Remove spaces at both ends of every line of running text. By default the text is scored as written."""
    skip: int = Field(default=0, ge=0)
    """Rows to skip at the start."""
    limit: int | None = Field(default=None, ge=1)
    """Largest number of rows to use."""

    @property
    def kind(self) -> str:
        """The kind of source: text, json, csv, parquet or hub."""
        return self._given(_KINDS)[0]

    @property
    def files(self) -> tuple[str, ...]:
        """All files in order; empty for the hub."""
        if isinstance(self.text, ParallelText):
            return (self.text.source, *self.text.target)
        return self.text or self.json_files or self.csv or self.parquet or ()

    @property
    def layout(self) -> Layout:
        """The kind of row: running text, prompt and response, source and target, or tokens."""
        if isinstance(self.text, ParallelText) or self.source:
            return "pair"
        if self.prompt:
            return "prompt"
        return "tokens" if self.input_ids else "text"

    @property
    def prompted(self) -> bool:
        """Whether rows separate an input from a response. False for running text and for tokens without labels."""
        return self.layout in ("prompt", "pair") or self.labels is not None

    @model_validator(mode="after")
    def _one_meaning(self) -> Self:
        if len(kinds := self._given(_KINDS)) != 1:
            raise ValueError(f"give exactly one of {', '.join(_KINDS)}; got {' and '.join(kinds) or 'none'}")
        columns = [name for names in _LAYOUTS.values() for name in self._given(names)]
        if self.text is not None and columns:
            raise ValueError(
                f"{columns[0]} names a column, but text files have no columns; use json, csv, parquet or hub"
            )
        if len([names for names in _LAYOUTS.values() if self._given(names)]) > 1:
            raise ValueError(
                "give column, or prompt and response, or source and target, or input_ids (and labels); "
                f"got {', '.join(columns)}"
            )
        for layout in ("prompt", "pair"):
            pair = _LAYOUTS[layout]
            if len(self._given(pair)) == 1:
                raise ValueError(f"{pair[0]} and {pair[1]} must be given together; got only {self._given(pair)[0]}")
        if self.labels and not self.input_ids:
            raise ValueError("labels needs input_ids")
        if self.strip and self.layout != "text":
            raise ValueError("strip applies only to running text")
        if self.hub is None and (extra := self._given(("config", "split"))):
            raise ValueError(f"{extra[0]} applies only to hub")
        if self.hub is not None and self.split is None:
            raise ValueError(f"hub {self.hub!r} needs a split, such as split: train")
        return self

    def _given(self, names: tuple[str, ...]) -> list[str]:
        return [name for name in names if getattr(self, "json_files" if name == "json" else name) is not None]


class DataSpec(Strict):
    """Data for training, for choosing checkpoints (``eval``) and for measurements (``test``), and the length of rows.

    Only ``block``, ``max_source`` and ``max_target`` cut rows. Without them, a row that is too long is an error. Rows
    of token ids are never cut.
    """

    model_config = ConfigDict(serialize_by_alias=True)

    folder: str = Field(default="", alias="dir")
    """Directory of the files, relative to the recipe."""
    train: Source | None = None
    """Rows that stages train on."""
    eval: Source | None = None
    """Rows that choose the best checkpoint."""
    test: Source | None = None
    """Rows that measurements use."""
    block: int | None = Field(default=None, ge=2)
    """Tokens per block of running text, and the limit of prompt and response; by default the model's context."""
    max_source: int | None = Field(default=None, ge=2)
    """Most tokens of a source (cut at its end) or of a prompt (cut at its start)."""
    max_target: int | None = Field(default=None, ge=2)
    """Most tokens of a target or response (cut at its end)."""

    def start(self, base: Path) -> Path:
        """Return the directory of the files, for a recipe in ``base``."""
        return base / Path(self.folder).expanduser()

    @model_validator(mode="after")
    def _sound(self) -> Self:
        if not (self.train or self.eval or self.test):
            raise ValueError("data needs train, eval or test")
        idle = next((name for name in ("block", "max_source", "max_target") if getattr(self, name) is not None), None)
        if idle and {each.layout for each in (self.train, self.eval, self.test) if each} == {"tokens"}:
            raise ValueError(f"{idle} cuts text, but all rows are input_ids, which are never cut; leave it out")
        return self
