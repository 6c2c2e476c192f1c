"""Metrics of text that is not English: refused where they cannot distinguish texts, and chosen where they can."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from rouge_score.tokenizers import DefaultTokenizer

from compress.artifact import Artifact
from compress.errors import DataError
from compress.measure import metrics
from compress.measure.quality import Quality
from compress.pipeline.records import Plain, join
from compress.problem import Problem

from .conftest import data_of

COLUMNS = {"causal": ("prompt", "response"), "seq2seq": ("source", "target")}
ENGLISH, CYRILLIC, HAN = ("a cat", "ate"), ("кот", "ел 7"), ("猫吃", "鱼 2")


def opened(artifact: Artifact, folder: Path, targets: list[tuple[str, str]]) -> Any:
    rows = [{"source": "cat", "target": target, "other": other} for target, other in targets]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given, wanted = COLUMNS["seq2seq" if artifact.config().is_encoder_decoder else "causal"]
    return data_of(artifact, folder, test={"json": "rows.jsonl", given: "source", wanted: ["target", "other"]})


def quality_of(metric: str) -> Quality:
    return Quality.model_validate({"metric": metric, "decoding": {"max_new_tokens": 8}})


@pytest.mark.parametrize("model", ["gpt2", "bart"])
@pytest.mark.parametrize(
    ("targets", "lost"),
    [
        ([CYRILLIC], 1),
        ([CYRILLIC, HAN, ENGLISH], 2),
        ([CYRILLIC, HAN, ENGLISH, ENGLISH], 0),  # half
        ([("кот", "cat"), HAN, ("größer", "ü")], 0),  # one reference with a word is enough
        ([("12", "3.5"), ("?", "!")], 0),  # no letters that could be lost
    ],
)
def test_rouge_is_refused_where_most_references_lose_their_words(
    gpt2: Artifact, bart: Artifact, tmp_path: Path, model: str, targets: list[tuple[str, str]], lost: int
) -> None:
    artifact = {"gpt2": gpt2, "bart": bart}[model]
    data = opened(artifact, tmp_path, targets)
    message = (
        f"ROUGE only counts the letters a to z, but {lost} of {len(targets)} rows of data.test have references without "
        "one; measure chrf or bleu"
    )
    assert list(quality_of("rouge").problems({}, data)) == ([Problem(("metric",), message)] if lost else [])
    assert not list(quality_of("chrf").problems({}, data))
    if lost:
        with pytest.raises(DataError, match=rf"^quality\.metric: {message}$"):
            quality_of("rouge").run({"base": artifact}, data=data, device="cpu", console=None)


def test_what_is_refused_is_what_rouge_cannot_tell_apart() -> None:
    """Texts without a to z are equal to nothing, themselves included; digits alone are left of them."""
    words = DefaultTokenizer(use_stemmer=True).tokenize
    assert [words(text) for text in (*CYRILLIC, *HAN)] == [[], ["7"], [], ["2"]]
    found = metrics.score("rouge", ["кот"], [["кот"]])
    assert found["rouge1"] == 0
    assert "words [a-z0-9]+" in found["signature"]


@pytest.mark.parametrize("tokenize", ["13a", "intl", "zh", "char", "none"])
def test_bleu_is_sacrebleu_with_that_tokenizer(tokenize: str) -> None:
    from sacrebleu import corpus_bleu

    texts, references = ["猫在垫子上吃鱼。", "the cat-sat on a mat."], ["猫在垫子上吃了鱼。", "the cat-sat on the mat."]
    found = metrics.score("bleu", texts, [[text] for text in references], bleu_tokenize=tokenize)
    assert found["bleu" if tokenize == "13a" else f"bleu_{tokenize}"] == pytest.approx(
        corpus_bleu(texts, [references], tokenize=tokenize).score
    )
    assert f"tok:{tokenize}|" in found["signature"]


def test_the_recipe_chooses_the_tokenizer(bart: Artifact, tmp_path: Path) -> None:
    data = opened(bart, tmp_path, [HAN, HAN])
    record: dict[str, Any] = {"name": "base"}
    plain: Plain = {}
    for tokenize in ("zh", "13a"):  # figures of both stand beside each other, in either order
        quality = quality_of("bleu").model_copy(update={"bleu_tokenize": tokenize})
        join(record, quality.run({"base": bart}, data=data, device="cpu", console=None)["base"], quality, plain)
    assert set(record["quality"]) == {"bleu_zh", "bleu", "samples"}
    signatures = record["conditions"]["quality"]["signatures"]
    assert "tok:zh|" in signatures["bleu_zh"] and "tok:13a|" in signatures["bleu"]


def test_a_tokenizer_belongs_to_bleu_and_keys_stay_without_one() -> None:
    with pytest.raises(
        ValidationError, match="bleu_tokenize: zh applies only to the bleu metric, which metric does not include"
    ):
        Quality.model_validate({"metric": "chrf", "bleu_tokenize": "zh"})
    with pytest.raises(ValidationError, match="bleu_tokenize"):
        Quality.model_validate({"metric": "bleu", "bleu_tokenize": "ja-mecab"})
    assert "bleu_tokenize" not in quality_of("bleu").model_dump()
    chosen = Quality.model_validate({"metric": ["bleu", "rouge"], "bleu_tokenize": "char"})
    assert chosen.model_dump()["bleu_tokenize"] == "char"
