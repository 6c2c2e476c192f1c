"""Metrics of ``evaluate``: a script by its path, or one in the library's cache by its name. Nothing else runs."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from compress.artifact import Artifact
from compress.errors import DataError, RecipeError
from compress.measure.metrics import imported
from compress.measure.metrics.imported import Imported
from compress.measure.quality import Quality

from .conftest import data_of

SCRIPTS = Path(__file__).parent / "scripts"
PAIRS = {"json": "rows.jsonl", "source": "question", "target": ["answer", "other"]}
EMPTY = "import evaluate\n\n\nclass Nothing(evaluate.Metric):\n    pass\n"


def measured(artifact: Artifact, folder: Path, metric: Any, base: Path = SCRIPTS) -> dict[str, Any]:
    decoding = {"max_new_tokens": 20, "do_sample": True, "seeds": [1]}
    quality = Quality.model_validate({"metric": metric, "decoding": decoding})
    quality.written_in(base)
    data = data_of(artifact, folder, test=PAIRS)
    return quality.run({"base": artifact}, data=data, device="cpu", console=None)["base"]


def test_the_numbers_of_a_script_become_figures(bart: Artifact, folder: Path) -> None:
    record = measured(bart, folder, ["chrf", {"path": "vowels.py"}])
    texts = "".join(sample["output"] for sample in record["quality"]["samples"])
    letters = [letter for letter in texts if letter.isalpha()]
    share = 100 * sum(letter in "aeiou" for letter in letters) / len(letters)
    assert set(record["quality"]) == {"chrf", "vowels", "most_references", "samples"}
    assert record["quality"]["vowels"] == pytest.approx(share)
    assert type(record["quality"]["vowels"]) is float
    assert record["quality"]["most_references"] == 2, "every reference is given"
    assert record["conditions"]["quality"]["signatures"]["vowels"].startswith("evaluate, vowels.py ")
    assert "figures" not in record


@pytest.mark.slow
def test_a_recipe_says_what_a_figure_is(bart: Artifact, folder: Path) -> None:
    figures = {"vowels": {"label": "vowels %", "better": "lower"}}
    record = measured(bart, folder, {"path": "vowels.py", "figures": figures})
    assert record["figures"] == figures
    with pytest.raises(RecipeError, match="vowels gives no number 'vowel'. Did you mean 'vowels'"):
        measured(bart, folder, {"path": "vowels.py", "figures": {"vowel": {"better": "lower"}}})
    with pytest.raises(ValidationError, match="unknown key 'bettr'"):
        Quality.model_validate({"metric": {"path": "vowels.py", "figures": {"vowels": {"bettr": "lower"}}}})


def test_a_plain_number_has_the_name_of_its_script(bart: Artifact, folder: Path) -> None:
    scores = Imported(path="same_length.py").opened(SCRIPTS).function
    found = scores(["ab", "a"], [["cd"], ["cd"]])
    assert found.pop("signature").startswith("evaluate, same_length.py")
    assert found == {"same_length": 0.5}
    with pytest.raises(DataError, match="same_length compares a text with one reference, but some rows have 2"):
        measured(bart, folder, {"path": "same_length.py"})


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (None, "there is no file .*mine.py"),
        ("class Nothing:\n", "mine.py is not Python: "),
        ("x = 1\n", "mine.py contains no metric; it needs a subclass of evaluate.Metric"),
        ("import no_such_library\n" + EMPTY, r"mine.py cannot be loaded: .*no_such_library"),
        (
            (SCRIPTS / "same_length.py").read_text().replace('datasets.Value("string")', 'datasets.Value("int32")'),
            "mine does not compare texts with references; it takes .*int32",
        ),
        (
            (SCRIPTS / "same_length.py").read_text().replace("return sum", "return {'why': 'none'} #"),
            "mine gives no number; it gives why",
        ),
        (
            (SCRIPTS / "same_length.py").read_text().replace("return sum", "return float('nan') #"),
            "mine gives nan for mine, which is not a finite number",
        ),
    ],
    ids=["missing", "syntax", "no class", "library", "integers", "no number", "not finite"],
)
def test_a_script_that_cannot_be_used_is_told(
    bart: Artifact, folder: Path, tmp_path: Path, script: str | None, message: str
) -> None:
    if script is not None:
        (tmp_path / "mine.py").write_text(script)
    rows = {**PAIRS, "target": "answer"}
    quality = Quality.model_validate({"metric": {"path": "mine.py"}, "decoding": {"max_new_tokens": 6}})
    quality.written_in(tmp_path)
    data = data_of(bart, folder, test=rows)
    with pytest.raises(Exception, match=rf"^quality\.metric: .*{message}"):
        quality.run({"base": bart}, data=data, device="cpu", console=None)
    found = list(quality.problems({}, data))
    assert ("gives" in message) == (not found), "what needs no text is found before any work"


def test_a_changed_script_is_another_measurement(tmp_path: Path) -> None:
    script = tmp_path / "vowels.py"
    shutil.copy(SCRIPTS / "vowels.py", script)
    quality = Quality.model_validate({"metric": ["bleu", {"path": "vowels.py"}]})
    quality.written_in(tmp_path)
    before = quality.depends_on
    assert list(before) == ["vowels"], "built-in metrics leave keys as they are"
    assert Quality.model_validate({"metric": ["bleu", "rouge"]}).depends_on == {}
    assert quality.model_copy(update={"of": ("one",)}).depends_on == before, "a copy starts from the same directory"
    script.write_text(script.read_text().replace("aeiou", "aei"))
    changed = quality.depends_on
    assert changed != before
    assert quality.metrics()["vowels"].function(["ou"], [["x"]])["vowels"] == 0, "and it is loaded anew"
    script.write_text("from .letters import VOWELS\n" + script.read_text().replace('"aei"', "VOWELS"))
    (tmp_path / "letters.py").write_text('VOWELS = "o"\n')
    first = quality.depends_on
    assert quality.metrics()["vowels"].function(["ou"], [["x"]])["vowels"] == 50
    (tmp_path / "letters.py").write_text('VOWELS = "ou"\n')
    assert quality.depends_on != first
    assert quality.metrics()["vowels"].function(["ou"], [["x"]])["vowels"] == 100


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of ``evaluate`` with a metric in two versions, as ``evaluate.load`` leaves them."""
    folder = tmp_path / "modules" / "evaluate_modules" / "metrics" / "evaluate-metric--sounds"
    for at, letters in enumerate(("aeiou", "a")):
        version = folder / (str(at) * 64)
        version.mkdir(parents=True)
        text = (SCRIPTS / "vowels.py").read_text().replace("aeiou", letters).replace('"vowels"', '"sounds"')
        (version / "sounds.py").write_text(text)
        os.utime(version / "sounds.py", (1e9 - at, 1e9 - at))
    monkeypatch.setattr(imported, "_modules", lambda: tmp_path / "modules")
    return tmp_path


def test_a_metric_in_the_cache_is_named_like_any_other(bart: Artifact, folder: Path, cache: Path) -> None:
    quality = Quality.model_validate({"metric": ["bleu", "sounds"]})
    assert quality.called == ["bleu", "sounds"]
    record = measured(bart, folder, ["bleu", "sounds"])
    assert {"bleu", "sounds"} < set(record["quality"])
    (metric,) = Quality.model_validate({"metric": {"name": "sounds"}}).metrics().values()
    assert metric.function(["ae"], [["x"]])["sounds"] == 100, "the newest script counts"


def test_an_unknown_name_is_told_with_what_would_be_known(cache: Path) -> None:
    with pytest.raises(ValidationError) as caught:
        Quality.model_validate({"metric": ["bleu", "rogue"]})
    text = caught.value.errors()[0]["msg"]
    assert "unknown metric 'rogue'. Did you mean 'rouge'? Known: perplexity, " in text
    assert "once evaluate.load has cached it; a script is given as {path: FILE}" in text
    assert caught.value.errors()[0]["loc"] == ("metric", 1)


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ({}, "give either path"),
        ({"path": "a.py", "name": "a"}, "give either path"),
        ({"pth": "a.py"}, "unknown key 'pth'. Did you mean 'path'"),
        ([{"path": "a/bleu.py"}, "bleu"], "two metrics are called 'bleu'; rename a script"),
        ([{"path": "a/x.py"}, {"path": "b/x.py"}], "two metrics are called 'x'; rename a script"),
        ([], "at least 1"),
        (3, "valid"),
    ],
)
def test_a_metric_that_is_written_wrongly_is_told(metric: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Quality.model_validate({"metric": metric})


def test_reading_a_recipe_runs_no_script(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n{EMPTY}")
    quality = Quality.model_validate({"metric": {"path": "mine.py"}})
    quality.written_in(tmp_path)
    assert quality.depends_on
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise ValueError('one\\ntwo')", r"broken.py fails \(ValueError: one two\)"),
        ("return {'conditions': 1.0}", "broken gives a number called conditions"),
    ],
)
def test_a_script_that_fails_is_one_line(body: str, message: str, bart: Artifact, folder: Path, tmp_path: Path) -> None:
    lines = (SCRIPTS / "vowels.py").read_text().splitlines()
    at = next(number for number, line in enumerate(lines) if line.lstrip().startswith("def _compute"))
    end = next(number for number in range(at, len(lines)) if lines[number].rstrip().endswith(":"))
    (tmp_path / "broken.py").write_text("\n".join([*lines[: end + 1], f"        {body}", ""]))
    with pytest.raises(RecipeError, match=message):
        measured(bart, folder, {"path": "broken.py"}, base=tmp_path)
