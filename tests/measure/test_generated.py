"""Text of torch and ONNX artifacts goes through the same code to the same numbers; a long count shows how far it is."""

import io
from typing import Any

import pytest
from pydantic import ValidationError
from rich.console import Console
from rouge_score import rouge_scorer

from compress.artifact import Artifact
from compress.cli.generate import Request, texts
from compress.generation.responses import response_texts
from compress.generation.settings import Decoding
from compress.generation.subject import subject_of
from compress.measure.quality import Quality
from compress.training.progress import counting

from .conftest import ROWS, data_of

METRICS = ("rouge", "bleu", "chrf", "exact_match", "length", "distinct")
PAIRS = {"json": "rows.jsonl", "source": "question", "target": ["answer", "other"]}


def quality_of(**written: Any) -> Quality:
    return Quality.model_validate({"metric": METRICS, "batch": 2} | written)


@pytest.mark.parametrize("num_beams", [1, 4])
def test_every_metric_is_the_same_in_both_runtimes(
    bart: Artifact, bart_onnx: Artifact, folder: Any, num_beams: int
) -> None:
    quality = quality_of(decoding={"max_new_tokens": 9, "num_beams": num_beams}, sentences="stops")
    found = quality.run(
        {"base": bart, "onnx": bart_onnx}, data=data_of(bart, folder, test=PAIRS), device="cpu", console=None
    )
    base, onnx = found["base"], found["onnx"]
    assert onnx["quality"] == base["quality"]
    keys = {"rouge1", "rouge2", "rougeL", "rougeLsum", "bleu", "chrf", "exact_match", "words_mean", "words_median"}
    keys |= {"reference_words_mean", "reference_words_median", "length_ratio", "empty", "full_length"}
    assert set(base["quality"]) == keys | {"distinct1", "distinct2", "distinct3", "samples"}
    first, second = base["conditions"]["quality"], onnx["conditions"]["quality"]
    assert first["decoding"]["num_beams"] == num_beams
    assert set(first["signatures"]) == set(METRICS)
    assert "nrefs:2" in first["signatures"]["bleu"]
    assert first | {"runtime": "onnxruntime"} == second


def test_rouge_is_that_of_the_samples(bart: Artifact, folder: Any) -> None:
    data = data_of(bart, folder, test=PAIRS)
    quality = quality_of(decoding={"max_new_tokens": 20}).run({"b": bart}, data=data, device="cpu", console=None)
    record = quality["b"]["quality"]
    assert [sample["row"] for sample in record["samples"]] == [0, 1, 2]
    assert [sample["references"] for sample in record["samples"]] == [[row["answer"], row["other"]] for row in ROWS]
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    best = [
        max(scorer.score(reference, sample["output"])["rougeL"].fmeasure for reference in sample["references"])
        for sample in record["samples"]
    ]
    assert record["rougeL"] == pytest.approx(100 * sum(best) / 3)


@pytest.mark.slow
@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("prompt", ["the cat , and a dog .", "a dog?"])
def test_generate_says_what_is_measured(bart: Artifact, bart_onnx: Artifact, prompt: str, num_beams: int) -> None:
    request = Request(prompt, max_new_tokens=12, temperature=0.0, seed=0, num_beams=num_beams)
    said = ["".join(texts(artifact.path, request)).strip() for artifact in (bart, bart_onnx)]
    tokenizer = bart.tokenizer()
    decoding = Decoding(max_new_tokens=12, num_beams=num_beams)
    ids = subject_of(bart_onnx, "cpu").generate([tokenizer(prompt)["input_ids"]], decoding, 0)[0]
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()
    assert said == [text, text]
    assert text


@pytest.mark.slow
def test_full_length_is_all_the_tokens_there_are(bart: Artifact, bart_onnx: Artifact, folder: Any) -> None:
    """The model forces its end token where max_new_tokens end, so a cut answer ends like any other."""
    data = data_of(bart, folder, test=PAIRS)
    assert data.test is not None
    prompts = [one.input_ids for one in data.test.examples]
    for artifact in (bart, bart_onnx):
        subject: Any = subject_of(artifact, "cpu")
        free = subject.generate(prompts, Decoding(max_new_tokens=16), 0)
        at, end = max((row.index(token), token) for row in free for token in row)
        subject.ends = [*subject.ends, end]
        ended = [row.index(end) + 1 if end in row else 99 for row in free]  # the end token counts
        assert at + 1 in ended
        for limit in {at, at + 1, at + 2, 12} - {0}:
            said = response_texts(subject, bart.tokenizer(), data.test, Decoding(max_new_tokens=limit), 2, 0)
            assert [answer.full for answer in said] == [size >= limit for size in ended]


def test_a_rule_for_sentences_needs_rouge() -> None:
    with pytest.raises(
        ValidationError, match="sentences: stops applies only to the rouge metric, which metric does not include"
    ):
        Quality.model_validate({"metric": "bleu", "sentences": "stops"})


def screen(*, terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=100)


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.slow
def test_a_terminal_sees_rows_and_the_time_to_go(bart: Artifact, folder: Any) -> None:
    data = data_of(bart, folder, test=PAIRS)
    quality = Quality.model_validate(
        {"metric": ["perplexity", "length"], "batch": 1, "decoding": {"max_new_tokens": 4}}
    )
    shown, plain = screen(terminal=True), screen(terminal=False)
    for console in (shown, plain):
        quality.run({"base": bart}, data=data, device="cpu", console=console)
    assert "base" in written(shown)
    assert "left" in written(shown)
    assert "6/6" in written(shown), "three rows are scored, and three answered"
    assert written(plain) == "quality of base: perplexity, length on data.test\n"


def test_counting_without_a_console_writes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with counting(None, "rows", 3) as advance:
        advance(2)
    assert capsys.readouterr() == ("", "")
