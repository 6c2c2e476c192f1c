"""A whole report from a work directory: what is written, and what is left out when it was not measured."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from compress.errors import UserError
from compress.report import build
from tests.report.workdir import PARAMETERS, write_run


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def report(workdir):
    build([workdir], workdir / "report")
    return workdir / "report"


def text(report, suffix):
    return (report / f"report.{suffix}").read_text(encoding="utf-8")


def test_headline_is_computed_from_the_numbers(report):
    sentence = text(report, "md").splitlines()[2]
    assert sentence == (
        "small-onnx is 26.1x smaller than base in float32 (474.7 → 18.20 MB) and 16.5x faster per token than base-onnx "
        "on this CPU; perplexity 54.88 → 58.02 (+5.7 %)."
    )
    assert sentence in text(report, "html")


def test_json_keeps_every_measured_field(report, workdir):
    found = json.loads(text(report, "json"))
    measured = json.loads((workdir / "measurements.json").read_text())
    assert set(found) >= {"artifacts", "environment"}
    for artifact, record in zip(found["artifacts"], measured["artifacts"], strict=True):
        assert record.items() <= artifact.items()
    assert found["artifacts"][0]["parameters"] == PARAMETERS
    assert found["artifacts"][0]["coverage"] == {}
    assert found["artifacts"][-1]["coverage"]["modules_touched"] == 49


def test_table_and_stages_are_in_markdown(report):
    markdown = text(report, "md")
    assert "| small-onnx | 64.1 M | 18.20 | 26.1x / 13.0x | 58.02 | +5.7 % |" in markdown
    assert "| recovered | distill | pruned, teacher base | 49 of 50 modules, 99.3 % of parameters |" in markdown
    assert "49 min 21 s" in markdown
    tables = [line for line in markdown.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in tables)


def test_html_stands_alone(report):
    page = text(report, "html")
    assert not re.search(r'(?:src|href)="(?!#)', page.replace("xlink:href", "href")), "nothing is loaded from outside"
    assert "<script" not in page
    assert "@import" not in page
    assert page.count("<svg") == 2 + 3 * 2 + 1 + 1, "two trade-offs, three trainings, one cut, one quantization"


def test_html_is_well_formed(report):
    void = {"meta", "br", "link", "hr", "img", "!doctype"}
    open_tags = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attrs):
            if tag not in void:
                open_tags.append(tag)

        def handle_endtag(self, tag):
            assert open_tags.pop() == tag

    Reader().feed(text(report, "html"))
    assert open_tags == []


def test_ids_are_unique(report):
    ids = re.findall(r'\bid="([^"]+)"', text(report, "html"))
    assert len(ids) == len(set(ids))


@pytest.mark.slow
def test_the_same_run_gives_the_same_report(report, workdir, tmp_path):
    build([workdir], tmp_path)
    for suffix in ("md", "json", "html"):
        assert text(tmp_path, suffix) == text(report, suffix)


@pytest.mark.slow
@pytest.mark.parametrize("measure", [set(), {"quality"}, {"size", "speed"}])
def test_what_was_not_measured_is_said_and_not_shown(tmp_path, measure):
    build([write_run(tmp_path / "run", measure=frozenset(measure), trained=False)], tmp_path / "out")
    markdown = text(tmp_path / "out", "md")
    for what in {"size", "quality", "speed"} - measure:
        assert f"- {what} of " in markdown
    assert ("| perplexity" in markdown) == ("quality" in measure)
    assert ("tokens/s" in markdown) == ("speed" in measure)
    assert "None" not in markdown
    assert "nan" not in re.sub(r"[a-z]+nan|nan[a-z]+", "", markdown)


@pytest.mark.slow
def test_several_runs_make_a_comparison(workdir, tmp_path):
    other = write_run(tmp_path / "other", measure=frozenset({"size"}), trained=False)
    build([workdir, other], tmp_path / "out")
    found = json.loads(text(tmp_path / "out", "json"))
    names = [artifact["name"] for artifact in found["artifacts"]]
    assert len(names) == len(set(names)) == 12
    assert names[0] == "run/base"
    assert names[6] == "other/base"
    assert len(found["headlines"]) == 2


@pytest.mark.slow
def test_text_of_a_user_cannot_become_markup(tmp_path):
    workdir = write_run(tmp_path / "run", trained=False)
    run = json.loads((workdir / "run.json").read_text())
    run["recipe"]["name"] = "<b>bold</b> | name"
    (workdir / "run.json").write_text(json.dumps(run))
    build([workdir], tmp_path / "out")
    assert "<b>bold</b>" not in text(tmp_path / "out", "html")


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no run.json"), ("{", "not JSON"), ("[]", "expected a JSON object"), ('{"stages": 3}', "stages")],
)
def test_a_broken_work_directory_is_the_users_mistake(tmp_path, content, message):
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        build([tmp_path], tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_a_stage_without_its_manifest_is_not_taken_for_an_untouched_model(tmp_path):
    workdir = write_run(tmp_path / "run", trained=False)
    manifest = next(workdir.glob("*-small-onnx-*")) / "artifact.json"
    manifest.unlink()
    with pytest.raises(UserError, match=rf"{manifest}: does not exist, so .* run the recipe again"):
        build([workdir], tmp_path / "out")


def test_no_work_directory_is_the_users_mistake(tmp_path):
    with pytest.raises(UserError, match="no work directory"):
        build([], tmp_path)


@pytest.mark.slow
def test_torch_is_never_imported():
    code = "import compress.report, sys; sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    subprocess.run([sys.executable, "-c", code], check=True)
