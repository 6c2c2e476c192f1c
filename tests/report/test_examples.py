"""Generated text in a report: which rows are shown, beside whom, and that text stays text."""

import json
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.measure.record import Record
from compress.report import build
from compress.report.examples import DIFFERING, FIRST, examples
from compress.report.numbers import Row
from compress.report.read import Manifest, Measurements, Run, RunFile
from tests.report.workdir import write_run


def rows_of(**written):
    """Rows of artifacts by name: {row: output}."""
    run = Run("run", RunFile(), Measurements(), ())
    return [
        Row(
            name,
            run,
            Record(name=name, quality={"samples": [sample(*each) for each in texts.items()]}, conditions={}),
            Manifest(),
        )
        for name, texts in written.items()
    ]


def sample(row, output):
    return {"row": row, "input": f"in {row}", "references": [f"ref {row}"], "output": output}


def titles(rows):
    return [example.title for example in examples(rows)]


def test_the_first_rows_and_then_those_that_differ_most():
    base = dict.fromkeys(range(0, 40, 2), "a b c d") | {0: "e"}
    small = base | {20: "a b c x", 30: "x y z", 34: "a b", 38: "a b c d e"}
    assert titles(rows_of(base=base, small=small)) == ["row 0", "row 2", "row 4", "row 30", "row 34", "row 20"]
    assert titles(rows_of(base=base, same=base)) == ["row 0", "row 2", "row 4"]
    assert titles(rows_of(base=base)) == ["row 0", "row 2", "row 4"]


def test_rows_are_those_that_differ_most_on_average():
    base = dict.fromkeys(range(10), "a b c d")
    one = base | {7: "a b x y", 8: "a b c x"}
    other = base | {5: "w x y z", 7: "a x y z", 9: "a b c x"}
    base[0] = "e"  # it does not say the same everywhere
    assert titles(rows_of(base=base, one=one, other=other))[FIRST:] == ["row 7", "row 5", "row 8"]


@pytest.mark.parametrize("says", ["", "the the the", "a"])
def test_who_says_the_same_everywhere_does_not_choose_rows(says):
    base = {row: f"{'a ' * row}b" for row in range(12)}
    small = base | {6: "x", 9: "y"}
    broken = dict.fromkeys(range(12), says)
    alike = ["row 0", "row 1", "row 2", "row 6", "row 9"]
    assert titles(rows_of(base=base, small=small, broken=broken)) == alike
    assert titles(rows_of(broken=broken, base=base, small=small)) == alike
    assert titles(rows_of(base=base, broken=broken)) == alike[:FIRST]


def test_drawn_text_is_reported_with_its_seed():
    rows = rows_of(base={0: "a"}, small={0: "a"}, sure={0: "b"}, old={0: "b"})
    quality = rows[0].record.quality
    quality["samples (split eval)"] = [sample(0, "c")]
    drawn, sure = {"do_sample": True, "seeds": [3, 5]}, {"do_sample": False, "num_beams": 2}
    for row, how in zip(rows[:3], [sure, drawn, sure], strict=True):
        row.record.conditions["quality"] = {"decoding": how}
    rows[0].record.conditions["quality (split eval)"] = {"decoding": drawn}
    names = [name for name, _ in examples(rows)[0].lines[2:]]
    assert names == ["base, small (seed 5)", "base (split eval, seed 5)", "sure, old"]


def test_a_text_stands_once_with_all_who_wrote_it():
    found = examples(rows_of(base={0: "same"}, onnx={0: "same"}, small={0: ""}))
    assert found[0].lines == [("input", "in 0"), ("reference", "ref 0"), ("base, onnx", "same"), ("small", "")]


def test_artifacts_on_other_rows_are_shown_too():
    found = examples(rows_of(base={0: "a", 1: "b"}, small={0: "a", 1: "c"}, other={7: "d"}))
    assert [list(example.outputs) for example in found] == [["base", "small"], ["base", "small"], ["other"]]


def test_several_references_are_numbered_and_old_records_have_one():
    rows = rows_of(base={0: "a"})
    rows[0].record.quality["samples"][0]["references"] = ["x", "y"]
    assert examples(rows)[0].lines[1:3] == [("reference 1", "x"), ("reference 2", "y")]
    rows[0].record.quality["samples"] = [{"input": "i", "reference": "r", "output": "o"}]
    assert examples(rows)[0].lines == [("input", "i"), ("reference", "r"), ("base", "o")]


WORDS = st.lists(st.sampled_from("abc"), max_size=5).map(" ".join)


@pytest.mark.slow
@given(st.dictionaries(st.integers(0, 50), st.tuples(WORDS, WORDS), min_size=1))
def test_no_row_left_out_differs_more_than_one_that_was_chosen(texts):
    texts = dict(sorted(texts.items()))
    base, small = ({row: pair[at] for row, pair in texts.items()} for at in (0, 1))
    rows = rows_of(base=base, small=small)
    found = examples(rows)
    assert [example.title for example in found[:FIRST]] == [f"row {row}" for row in list(texts)[:FIRST]]
    chosen = found[FIRST:]
    assert len(chosen) <= DIFFERING
    names = ("base", "small")
    assert all(example.difference(names) > 0 for example in chosen)
    if any(len(set(side.values())) == 1 for side in (base, small)):
        assert not chosen
        return
    shown = {example.title for example in found}
    left = [one for row in texts if f"row {row}" not in shown for one in rows_alone(row, base, small)]
    least = min((example.difference(names) for example in chosen), default=0)
    assert all(one.difference(names) <= least for one in left)


def rows_alone(row, base, small):
    return examples(rows_of(base={row: base[row]}, small={row: small[row]}))


HOSTILE = "<b>bold</b> | `code` *star* _line_ [link](x) &amp; 2 < 3\n# no heading\n\n- no list"


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A comparison of two runs that wrote hostile text for the same row."""
    folder = tmp_path_factory.mktemp("runs")
    for name in ("one", "two"):
        path = write_run(folder / name, trained=False) / "measurements.json"
        measured = json.loads(path.read_text())
        for record in measured["artifacts"]:
            text = HOSTILE if record["name"] == "base" else f"{name} {record['name']}"
            record["quality"]["samples"] = [{"row": 4, "input": HOSTILE, "references": [HOSTILE, ""], "output": text}]
            decoding = {"max_new_tokens": 64, "do_sample": False, "num_beams": 5, "length_penalty": 1.25}
            signatures = {"bleu": "nrefs:var|case:mixed"}
            record["conditions"]["quality"] |= {"decoding": decoding, "signatures": signatures}
        path.write_text(json.dumps(measured))
    build([folder / "one", folder / "two"], folder / "out")
    return {suffix: (folder / "out" / f"report.{suffix}").read_text() for suffix in ("md", "html")}


def test_a_page_shows_text_as_it_was_written(report):
    cells = []

    class Reader(HTMLParser):
        inside = False

        def handle_starttag(self, tag, attrs):
            self.inside = tag in ("dd", "em")
            if tag == "dd":
                cells.append("")

        def handle_data(self, data):
            if self.inside:
                cells[-1] += data

    section = report["html"].partition("<h2>Examples of generated text</h2>")[2].partition("</section>")[0]
    Reader().feed(section)
    assert [cell.strip() for cell in cells[:3]] == [HOSTILE, HOSTILE, "empty"]
    names = re.findall(r"<dt>(.*?)</dt>", section)
    assert names[:5] == ["input", "reference 1", "reference 2", "one/base, two/base", "one/pruned"]
    assert section.count("<article") == 1, "both runs stand in one example"


def test_markdown_escapes_text(report):
    section = report["md"].partition("## Examples of generated text")[2].partition("\n## ")[0]
    row = next(line for line in section.splitlines() if line.startswith("| one/base, two/base |"))
    assert row == (
        "| one/base, two/base | \\<b\\>bold\\</b\\> \\| \\`code\\` \\*star\\* \\_line\\_ \\[link\\](x) \\&amp; 2 \\< 3"
        "<br># no heading<br>- no list |"
    )
    table = [line for line in section.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {3}
    assert "| reference 2 | *empty* |" in table


@pytest.mark.slow
def test_long_inputs_are_cut_behind_a_word_in_markdown_alone(tmp_path):
    path = write_run(tmp_path / "run", trained=False) / "measurements.json"
    measured = json.loads(path.read_text())
    long = "word " * 400
    for record in measured["artifacts"]:
        record["quality"]["samples"] = [{"row": 0, "input": long, "references": [long], "output": long}]
    path.write_text(json.dumps(measured))
    build([tmp_path / "run"], tmp_path)
    lines = (tmp_path / "report.md").read_text().splitlines()
    cut = next(line for line in lines if line.startswith("| input |"))
    assert cut.endswith("word \\[…\\] |")
    assert 500 < len(cut) < 650
    assert long.strip() in next(line for line in lines if line.startswith("| reference |"))
    assert long in (tmp_path / "report.html").read_text()


def test_settings_and_signatures_stand_with_the_conditions(report):
    for line in (
        "- quality.decoding.num_beams: 5",
        "- quality.decoding.length_penalty: 1.25",
        "- quality.signatures.bleu: nrefs:var|case:mixed",
    ):
        assert line in report["md"].partition("## Conditions")[2].splitlines()
    assert "<dt>quality.signatures.bleu</dt><dd>nrefs:var|case:mixed</dd>" in report["html"]
