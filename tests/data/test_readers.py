import gzip
import json
import re
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from compress.data import Source
from compress.data.readers import TextPair, TokenRow, read_pairs, read_text, read_tokens
from compress.errors import DataError

from .conftest import LINES


def source(**written: Any) -> Source:
    return Source.model_validate(written)


def test_text_lines_come_as_they_are(folder: Path) -> None:
    assert read_text(source(text="lines.txt"), folder) == [f" {line} " for line in LINES]


def test_several_files_follow_each_other(folder: Path) -> None:
    assert len(read_text(source(text=["lines.txt", "lines.txt"]), folder)) == 2 * len(LINES)


def test_skip_and_limit_split_one_file(folder: Path) -> None:
    first = read_text(source(text="lines.txt", limit=1), folder)
    rest = read_text(source(text="lines.txt", skip=1), folder)
    assert first + rest == read_text(source(text="lines.txt"), folder)


def test_prompt_rows(folder: Path) -> None:
    pairs = read_pairs(source(json="rows.jsonl", prompt="question", response="answer"), folder)
    assert pairs == [TextPair("the cat?\n", ("sat",)), TextPair("a dog?\n", ("ran far",))]


def test_template_fills_columns_and_leaves_nothing_for_null(folder: Path) -> None:
    pairs = read_pairs(source(json="rows.jsonl", prompt="Q: {question}{hint}|", response="answer"), folder)
    assert [pair.text for pair in pairs] == ["Q: the cat?|", "Q: a dog?far|"]


def test_references_from_columns_and_from_lists(folder: Path) -> None:
    pairs = read_pairs(source(json="rows.jsonl", source="question", target=["answer", "more"]), folder)
    assert [pair.references for pair in pairs] == [("sat", "sat", "ate"), ("ran far", "ran")]


def test_free_places_among_references_are_none(folder: Path) -> None:
    def references(*targets: str) -> list[tuple[str, ...]]:
        rows = read_pairs(source(json="free.jsonl", source="s", target=list(targets)), folder)
        return [row.references for row in rows]

    rows = [{"s": "a", "t": "x", "u": None, "v": ["y", " "]}, {"s": "b", "t": "", "u": "z", "v": []}]
    (folder / "free.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert references("t", "u", "v") == [("x", "y"), ("z",)]
    assert references("t") == [("x",), ("",)]
    with pytest.raises(DataError, match=r"^row 0: column 'u' contains nothing, not text"):
        references("u")
    with pytest.raises(DataError, match=r"^row 1: column 'v' contains nothing, not text"):
        references("v")


@pytest.mark.parametrize("asked", ["pair.en", "{pair.en}"])
def test_a_field_of_a_nested_column_is_a_column(folder: Path, asked: str) -> None:
    (folder / "nested.jsonl").write_text(
        '{"pair": {"en": "a cat", "ro": "o pisica"}}\n{"pair": {"en": "x", "ro": "y"}}\n'
    )
    pairs = read_pairs(source(json="nested.jsonl", source=asked, target="pair.ro"), folder)
    assert pairs == [TextPair("a cat", ("o pisica",)), TextPair("x", ("y",))]


def test_csv_cells_are_text(folder: Path) -> None:
    pairs = read_pairs(source(csv="rows.csv", prompt="question", response="answer"), folder)
    assert pairs == [TextPair("007\n", ("NA",)), TextPair("the cat?\n", ("",))]


@pytest.mark.parametrize("ending", ["parquet", "tsv.gz"])
def test_other_tables_hold_the_same_rows(folder: Path, ending: str) -> None:
    table = {"q": ["x", "y"], "a": ["1", "2"]}
    if ending == "parquet":
        datasets.Dataset.from_dict(table).to_parquet(str(folder / "t.parquet"))
        found = source(parquet="t.parquet", prompt="q", response="a")
    else:
        (folder / "t.tsv.gz").write_bytes(gzip.compress(b"q\ta\nx\t1\ny\t2\n"))
        found = source(csv="t.tsv.gz", prompt="q", response="a")
    assert read_pairs(found, folder) == [TextPair("x\n", ("1",)), TextPair("y\n", ("2",))]


def test_a_byte_order_mark_and_windows_lines_are_no_text(folder: Path) -> None:
    (folder / "w.csv").write_bytes(b"\xef\xbb\xbfq,a\r\nx,1\r\n")
    (folder / "w.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert read_pairs(source(csv="w.csv", prompt="q", response="a"), folder) == [TextPair("x\n", ("1",))]
    assert read_text(source(text="w.txt"), folder) == ["one", "two"]


@pytest.mark.parametrize("template", ["{question:d}", "{question!z}", "{question"])
def test_a_template_that_fits_no_text_is_reported(folder: Path, template: str) -> None:
    with pytest.raises(DataError, match="^'{question"):
        read_pairs(source(csv="rows.csv", prompt=template, response="answer"), folder)


def test_parallel_files(folder: Path) -> None:
    (folder / "a.en.gz").write_bytes(gzip.compress(b"one\ntwo\nthree\n"))
    (folder / "a.de").write_text("eins\nzwei\ndrei\n")
    (folder / "b.de").write_text("ein\nzwo\nDrei\n")
    pairs = read_pairs(source(text={"source": "a.en.gz", "target": ["a.de", "b.de"]}, skip=1, limit=1), folder)
    assert pairs == [TextPair("two", ("zwei", "zwo"))]


def test_token_rows(folder: Path) -> None:
    rows = read_tokens(source(json="rows.jsonl", input_ids="ids", labels="labels"), folder)
    assert rows == [TokenRow([1, 2, 3], [-100, 2, 3]), TokenRow([4, 5], [4, 5])]


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ([[1, 2], [5, 6.5, 7]], "row 1: column 'ids' contains 6.5, which is not a token id"),
        ([[1, 2], [5, None]], "row 1: column 'ids' contains None, which is not a token id"),
        ([[1.0, 2.0]], "row 0: column 'ids' contains 1.0, which is not a token id"),
        ([[True, False]], "row 0: column 'ids' contains True, which is not a token id"),
        ([["5"]], "row 0: column 'ids' contains '5', which is not a token id"),
        ([3], "row 0: column 'ids' contains int, not a list of token ids"),
    ],
)
def test_what_is_no_token_id_is_named(folder: Path, cells: list[Any], message: str) -> None:
    (folder / "odd.jsonl").write_text("".join(json.dumps({"ids": cell}) + "\n" for cell in cells))
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        read_tokens(source(json="odd.jsonl", input_ids="ids"), folder)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({"text": "gone.txt"}, "^there is no file .*gone.txt"),
        ({"text": "empty.txt"}, ".*empty.txt is empty"),
        (
            {"json": "rows.jsonl", "column": "body"},
            "no column 'body'; allowed: question, answer, more, hint, ids, labels",
        ),
        ({"json": "rows.jsonl", "column": "hint"}, "row 0: column 'hint' contains nothing, not text"),
        ({"json": "rows.jsonl", "column": "ids"}, "row 0: column 'ids' contains list, not text"),
        ({"json": "lines.txt"}, "cannot read .*lines.txt as json: "),
        ({"csv": "ragged.csv"}, "cannot read .*ragged.csv as csv: row 1 has 1 cells, but the header has 2"),
        ({"parquet": "lines.txt"}, "cannot read .*lines.txt as parquet: "),
        ({"csv": "latin.csv"}, "cannot read .*latin.csv as csv: 'utf-8' codec can't decode byte 0xe9"),
        ({"text": "latin.csv"}, "cannot read .*latin.csv as text: 'utf-8' codec can't decode byte 0xe9"),
        ({"text": "lines.txt", "skip": 9}, "there are 4 rows, and skip: 9 leaves none"),
        ({"hub": "nobody/nothing", "split": "train"}, "cannot load 'nobody/nothing' from the hub: .*use a local copy"),
    ],
)
def test_mistakes_are_reported_in_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, written: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    (folder / "empty.txt").touch()
    (folder / "ragged.csv").write_text("a,b\n1,2\n3\n")
    (folder / "latin.csv").write_text("a\ncaf\xe9\n", encoding="latin-1")
    with pytest.raises(DataError, match=message) as caught:
        read_text(source(**written), folder)
    assert "\n" not in str(caught.value)


EMPTY = {
    "lines.txt": b"",
    "lines.txt.gz": gzip.compress(b""),
    "rows.jsonl.gz": gzip.compress(b""),
    "list.json": b"[]",
    "object.json": b"{}",
    "header.csv": b"text\n",
    "header.csv.gz": gzip.compress(b"text\n"),
}


@pytest.mark.parametrize("name", EMPTY)
def test_files_without_a_row_are_reported(folder: Path, name: str) -> None:
    (folder / name).write_bytes(EMPTY[name])
    kind = {".json": "json", ".csv": "csv", ".txt": "text", ".jsonl": "json"}[Path(name.removesuffix(".gz")).suffix]
    with pytest.raises(DataError, match=r"(is empty|has no rows|there are 0 rows, and skip: 0 leaves none)") as caught:
        read_text(Source.model_validate({kind: name}), folder)
    assert "\n" not in str(caught.value)


def test_a_table_without_a_row_is_reported(folder: Path) -> None:
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), folder / "rows.parquet")
    with pytest.raises(DataError, match=r"rows\.parquet has no rows"):
        read_text(Source.model_validate({"parquet": "rows.parquet"}), folder)


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "lines.txt.gz", "rows.csv.gz"])
def test_a_file_that_was_cut_off_is_reported(folder: Path, name: str) -> None:
    whole = gzip.compress(b"text\nthe cat\n" * 50)
    (folder / name).write_bytes(whole[: len(whole) // 2])
    kind = {"rows.jsonl.gz": "json", "lines.txt.gz": "text", "rows.csv.gz": "csv"}[name]
    with pytest.raises(DataError, match=rf"^cannot read .*{name} as {kind}: ."):
        read_text(Source.model_validate({kind: name}), folder)


def test_parallel_files_of_unequal_length(folder: Path) -> None:
    (folder / "short.txt").write_text("one\n")
    with pytest.raises(DataError, match=r"lines\.txt has 4 lines and short\.txt has 1"):
        read_pairs(source(text={"source": "lines.txt", "target": "short.txt"}), folder)


def test_reading_leaves_settings_of_datasets_alone(folder: Path) -> None:
    verbosity = datasets.logging.get_verbosity()
    read_text(source(text="lines.txt"), folder)
    assert datasets.logging.get_verbosity() == verbosity
    assert not datasets.are_progress_bars_disabled()
