import pytest
from pydantic import ValidationError

from compress.data import DataSpec, Source


@pytest.mark.parametrize(
    ("written", "kind", "layout"),
    [
        ({"text": "a.txt"}, "text", "text"),
        ({"text": ["a.txt", "b.txt"]}, "text", "text"),
        ({"text": {"source": "a.gz", "target": "b.gz"}}, "text", "pair"),
        ({"json": "a.jsonl"}, "json", "text"),
        ({"csv": "a.csv", "column": "body"}, "csv", "text"),
        ({"json": "a.jsonl", "prompt": "q", "response": "a"}, "json", "prompt"),
        ({"parquet": "a.parquet", "source": "x", "target": ["y1", "y2"]}, "parquet", "pair"),
        ({"json": "a.jsonl", "input_ids": "ids", "labels": "labels"}, "json", "tokens"),
        ({"hub": "wikitext", "config": "wikitext-2-raw-v1", "split": "test", "column": "text"}, "hub", "text"),
    ],
)
def test_every_short_form_is_understood_and_round_trips(written: dict[str, object], kind: str, layout: str) -> None:
    source = Source.model_validate(written)
    assert (source.kind, source.layout) == (kind, layout)
    assert Source.model_validate(source.model_dump(mode="json", exclude_none=True)) == source


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({}, "give exactly one of text, json, csv, parquet, hub; got none"),
        ({"text": "a", "json": "b"}, "got text and json"),
        ({"text": "a", "column": "x"}, "column names a column, but text files have no columns"),
        ({"json": "a", "prompt": "x"}, "prompt and response must be given together; got only prompt"),
        ({"json": "a", "target": "x"}, "source and target must be given together; got only target"),
        ({"json": "a", "column": "x", "input_ids": "y"}, "give column, or prompt and response"),
        ({"json": "a", "labels": "y"}, "labels needs input_ids"),
        ({"json": "a", "split": "test"}, "split applies only to hub"),
        ({"hub": "a"}, "needs a split"),
        ({"json": "a", "source": "x", "target": "y", "strip": True}, "strip applies only to running text"),
        ({"text": {"source": "a", "target": "b"}, "strip": True}, "strip applies only to running text"),
        ({"json": "a", "limit": 0}, "greater than or equal to 1"),
        ({"jsn": "a"}, "Did you mean 'json'?"),
    ],
)
def test_what_has_no_one_meaning_is_refused(written: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message.replace("?", r"\?")):
        Source.model_validate(written)


def test_data_without_a_source_is_refused() -> None:
    with pytest.raises(ValidationError, match="train, eval or test"):
        DataSpec()
