import os
import subprocess
import sys
from pathlib import Path

import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score import rouge_scorer

from compress.measure import metrics

PREDICTIONS = ["the cat sat on a mat", "the dogs were running far away", "it rains"]
REFERENCES = [
    ["the cat sat on the mat", "a mat is under the cat"],
    ["the dog ran far away"],
    ["it is raining", "it rains"],
]


def test_rouge_is_the_best_reference_of_rouge_score() -> None:
    scorer = rouge_scorer.RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
    found = metrics.score("rouge", PREDICTIONS, REFERENCES)
    for kind in ("rouge1", "rougeL"):
        best = [
            max(scorer.score(reference, prediction)[kind].fmeasure for reference in references)
            for prediction, references in zip(PREDICTIONS, REFERENCES, strict=True)
        ]
        assert found[kind] == pytest.approx(100 * sum(best) / 3)


SUMMARIES = ["Tom came late. Ann left!", "Is it so? It is (they say.) And Ann agrees", "one line\nand another. End."]
TARGETS = [
    ["Ann left. Tom came late.", "Tom was late."],
    ["It is so. And Ann agrees.", "So they say. It is.", "Ann agrees. Is it so?"],
    ["And another. One line."],
]


def by_hand(text: str) -> str:
    """The same sentences, a line each, found without a regular expression."""
    lines, words = [], text.replace("\n", " \n ").split(" ")
    line: list[str] = []
    for word in words:
        if word == "\n":
            lines, line = [*lines, line], []
            continue
        line.append(word)
        if word.rstrip("\"')]").endswith((".", "!", "?")):
            lines, line = [*lines, line], []
    return "\n".join(" ".join(line) for line in [*lines, line] if line)


@pytest.mark.parametrize("sentences", ["lines", "stops"])
def test_rouge_of_sentences_is_that_of_rouge_score_on_lines(sentences: str) -> None:
    kinds = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    scorer = rouge_scorer.RougeScorer(kinds, use_stemmer=True)
    cut = by_hand if sentences == "stops" else str
    found = metrics.score("rouge", SUMMARIES, TARGETS, sentences=sentences)
    for kind in kinds:
        rows = [
            max(scorer.score(cut(target), cut(text))[kind].fmeasure for target in targets)
            for text, targets in zip(SUMMARIES, TARGETS, strict=True)
        ]
        assert found[kind] == pytest.approx(100 * sum(rows) / len(rows), abs=1e-9)
    assert ("stops" if "!" in found["signature"] else "lines") == sentences


def test_sentences_change_lsum_alone() -> None:
    lines, stops = (metrics.score("rouge", SUMMARIES, TARGETS, sentences=rule) for rule in ("lines", "stops"))
    assert stops["rougeLsum"] > lines["rougeLsum"]
    assert all(stops[kind] == lines[kind] for kind in ("rouge1", "rouge2", "rougeL"))


def test_signatures_say_what_was_computed() -> None:
    assert "nrefs:var" in metrics.score("bleu", SUMMARIES, TARGETS)["signature"]
    assert "nrefs:1|" in metrics.score("chrf", SUMMARIES, [row[:1] for row in TARGETS])["signature"]
    assert metrics.score("rouge", SUMMARIES, TARGETS)["signature"].startswith("rouge_score 0.")


def test_length_counts_words_and_shares_of_rows() -> None:
    predictions, references = ["a b c", "", "one  two\nthree four five"], [["a b", "a b c d"], ["x y"], ["z"]]
    found = metrics.score("length", predictions, references, full=[False, False, True])
    assert found.pop("signature")
    golden = {
        "words_mean": 8 / 3,
        "words_median": 3.0,
        "reference_words_mean": 2.0,
        "reference_words_median": 2.0,
        "length_ratio": 8 / 6,
        "empty": 100 / 3,
        "full_length": 100 / 3,
    }
    assert found == pytest.approx(golden)
    assert "full_length" not in metrics.score("length", predictions, references)


def test_references_without_a_word_have_no_ratio() -> None:
    found = metrics.score("length", ["a"], [[" "]])
    assert (found["words_mean"], found["reference_words_mean"], found["empty"]) == (1, 0, 0)
    assert "length_ratio" not in found


def test_distinct_n_grams_stay_within_rows() -> None:
    found = metrics.score("distinct", ["a b a b", "b a", "A", ""], [["x"]] * 4)
    # words a b A of 7; pairs ab ba of ab ba ab ba; triples aba bab of two
    golden = {"distinct1": 300 / 7, "distinct2": 50.0, "distinct3": 100.0}
    assert {name: found[name] for name in golden} == pytest.approx(golden)
    nothing = metrics.score("distinct", ["", " "], [["x"]] * 2)
    assert [nothing[f"distinct{n}"] for n in (1, 2, 3)] == [0, 0, 0]


WORDS = st.lists(st.sampled_from(["a", "b", "c d", ""]), max_size=6).map(" ".join)


@settings(max_examples=25, deadline=None)
@given(st.lists(WORDS, min_size=1, max_size=4))
def test_distinct_is_a_share_that_a_repeated_corpus_halves(texts: list[str]) -> None:
    once, twice = (metrics.score("distinct", rows, [["x"]] * len(rows)) for rows in (texts, texts * 2))
    for n in (1, 2, 3):
        assert 0 <= once[f"distinct{n}"] <= 100
        assert twice[f"distinct{n}"] == pytest.approx(once[f"distinct{n}"] / 2)


@settings(max_examples=25, deadline=None)
@given(st.lists(WORDS, min_size=1, max_size=4))
def test_texts_that_are_their_references_have_length_ratio_one(texts: list[str]) -> None:
    found = metrics.score("length", texts, [[text, text] for text in texts])
    assert found["words_mean"] == pytest.approx(found["reference_words_mean"])
    assert found["words_median"] == found["reference_words_median"]
    assert found.get("length_ratio", 1) == pytest.approx(1)
    assert ("length_ratio" in found) == any(text.split() for text in texts)


@pytest.mark.parametrize(("name", "truth"), [("bleu", sacrebleu.corpus_bleu), ("chrf", sacrebleu.corpus_chrf)])
def test_sacrebleu_figures(name: str, truth: object) -> None:
    assert callable(truth)
    streams = [
        ["the cat sat on the mat", "the dog ran far away", "it is raining"],
        ["a mat is under the cat", None, "it rains"],
    ]
    assert metrics.score(name, PREDICTIONS, REFERENCES)[name] == pytest.approx(truth(PREDICTIONS, streams).score)
    single = [[row[0]] for row in REFERENCES]
    assert metrics.score(name, PREDICTIONS, single)[name] == pytest.approx(truth(PREDICTIONS, streams[:1]).score)


def test_exact_match_takes_any_reference() -> None:
    assert metrics.score("exact_match", ["a ", "b", "c"], [["a"], ["x", "b"], ["C"]])["exact_match"] == pytest.approx(
        200 / 3
    )


@pytest.mark.slow
def test_metrics_need_no_network_and_leave_nothing_behind(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from compress.measure import metrics\n"
        "from compress.measure.metrics import imported\n"
        "from compress.registry import METRICS\n"
        "names = [name for name in METRICS.builtin if METRICS.get(name).reads == 'text']\n"
        "assert len(names) == 6\n"
        "for name in names:\n"
        "    assert metrics.score(name, ['a b c d'], [['a b c d']])['signature']\n"
        "assert 'evaluate' not in sys.modules, 'built-in metrics need no library that loads scripts'\n"
        "script = imported.Imported(path='vowels.py').opened(Path(sys.argv[1]))\n"
        "assert script.function(['a b'], [['a']])['vowels'] == 50\n"
        "print(imported._cache())"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).with_name("scripts"))],
        cwd=root,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    assert not Path(done.stdout.strip()).exists()
    assert not list(tmp_path.rglob("*.py"))
