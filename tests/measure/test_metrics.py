import os
import subprocess
import sys
from pathlib import Path

import pytest
import sacrebleu
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


def test_metrics_need_no_network_and_leave_nothing_behind(tmp_path: Path) -> None:
    code = (
        "from compress.measure import metrics\n"
        "for name in metrics.NAMES:\n"
        "    assert metrics.score(name, ['a b c d'], [['a b c d']])['signature']\n"
        "print(metrics._cache())"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=environment, check=True, capture_output=True, text=True
    )
    assert not Path(done.stdout.strip()).exists()
    assert not list(tmp_path.rglob("*.py"))
