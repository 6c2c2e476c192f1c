import json
import math
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from compress.artifact import Artifact, adopt
from compress.data import Data
from compress.errors import DataError, RecipeError
from compress.functional.divergence import forward_kl
from compress.generation.settings import Decoding, ends_of, padded, until_end
from compress.generation.subject import subject_of
from compress.measure.quality import Quality
from compress.stages.seq_kd import SeqKd

from .conftest import LINES, data_of

TEXT = {"text": "lines.txt"}
PROMPTS = {"json": "rows.jsonl", "prompt": "question", "response": ["answer", "other"]}
PAIRS = {"json": "rows.jsonl", "source": "question", "target": "answer"}


def measured(quality: Quality, artifacts: dict[str, Artifact], data: Data | None) -> dict[str, dict[str, Any]]:
    return quality.run(artifacts, data=data, device="cpu", console=None)


def test_perplexity_is_that_of_blocks_scored_one_by_one(gpt2: Artifact, folder: Path) -> None:
    quality = measured(Quality(batch=2), {"base": gpt2}, data_of(gpt2, folder, test=TEXT, block=8))["base"]["quality"]
    text = "\n".join(LINES * 2)
    ids = torch.tensor(gpt2.tokenizer()(text)["input_ids"])
    model: Any = gpt2.model().double()
    total = 0.0
    for at in range(0, len(ids) - 1, 8):
        block = ids[at : at + 9]
        with torch.no_grad():
            logits = model(block[None, :-1]).logits[0]
        total += float(F.cross_entropy(logits, block[1:], reduction="sum"))
    tokens, words = len(ids) - 1, len(text.split()) + 6
    assert quality["perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-4)
    assert quality["word_perplexity"] == pytest.approx(math.exp(total / words), rel=1e-4)
    assert quality["bits_per_byte"] == pytest.approx(total / math.log(2) / len(text), rel=1e-5)
    assert (quality["tokens"], quality["words"], quality["context"], quality["stride"]) == (tokens, words, 8, 8)


@pytest.mark.slow
@pytest.mark.parametrize("test", [TEXT, PROMPTS])
def test_torch_and_onnx_agree(gpt2: Artifact, gpt2_onnx: Artifact, folder: Path, test: dict[str, Any]) -> None:
    data = data_of(gpt2, folder, test=test)
    metric = ("perplexity", "agreement") if test is TEXT else ("perplexity", "bleu", "rouge")
    quality = Quality.model_validate(
        {"metric": metric, "batch": 2, "decoding": {"max_new_tokens": 6}}
        | ({"reference": "base"} if test is TEXT else {})
    )
    found = measured(quality, {"base": gpt2, "onnx": gpt2_onnx}, data)
    base, onnx = found["base"]["quality"], found["onnx"]["quality"]
    assert onnx["perplexity"] == pytest.approx(base["perplexity"], rel=1e-4)
    if test is TEXT:
        assert (base["agreement"], base["kl"]) == (100, 0)
        assert onnx["agreement"] == 100
        assert onnx["kl"] == pytest.approx(0, abs=1e-5)
    else:
        assert onnx["samples"] == base["samples"]
    assert found["onnx"]["conditions"]["quality"]["runtime"] == "onnxruntime"


@pytest.mark.slow
def test_agreement_looks_at_scored_tokens_alone(gpt2: Artifact, folder: Path, tmp_path: Path) -> None:
    other: Any = gpt2.model()
    with torch.no_grad():
        other.transformer.ln_f.bias.add_(0.5 * torch.randn(32, generator=torch.Generator().manual_seed(1)))
    other.save_pretrained(tmp_path)
    artifacts = {"base": gpt2, "other": adopt(tmp_path)}
    data = data_of(gpt2, folder, test=PROMPTS)
    quality = Quality.model_validate({"metric": "agreement", "reference": "base", "of": ["other"], "batch": 3})
    found = measured(quality, artifacts, data)["other"]["quality"]
    assert data.test is not None
    same, divergence, count = 0, 0.0, 0
    for row in data.test:
        with torch.no_grad():
            mine, theirs = (model(torch.tensor([row["input_ids"]])).logits[0] for model in (other, gpt2.model()))
        for at, label in enumerate(row["labels"]):
            if label != -100:
                same += int(mine[at].argmax() == theirs[at].argmax())
                divergence += float(forward_kl(mine[at], theirs[at]))
                count += 1
    assert found["agreement"] == pytest.approx(100 * same / count)
    assert found["kl"] == pytest.approx(divergence / count, rel=1e-3)
    assert found["kl"] > 0


@pytest.mark.slow
def test_greedy_text_does_not_depend_on_the_batch(gpt2: Artifact, folder: Path) -> None:
    data = data_of(gpt2, folder, test=PROMPTS)
    samples = [
        measured(
            Quality.model_validate({"metric": "rouge", "batch": batch, "decoding": {"max_new_tokens": 8}}),
            {"base": gpt2},
            data,
        )["base"]["quality"]["samples"]
        for batch in (1, 3)
    ]
    assert samples[0] == samples[1]
    assert data.test is not None
    prompt = torch.tensor([data.test.examples[0].input_ids])
    model: Any = gpt2.model()
    text = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False, pad_token_id=0
    )
    expected = (
        gpt2.tokenizer().decode(until_end(text[0, prompt.shape[1] :].tolist(), 0), skip_special_tokens=True).strip()
    )
    assert samples[0][0]["output"] == expected


@pytest.mark.slow
def test_sampling_reports_mean_and_deviation_over_seeds(gpt2: Artifact, folder: Path) -> None:
    data = data_of(gpt2, folder, test=PROMPTS)
    decoding = {"max_new_tokens": 8, "do_sample": True, "seeds": [1, 2, 3]}
    quality = Quality.model_validate({"metric": ["rouge", "chrf", "length"], "decoding": decoding})
    first, again = (measured(quality, {"base": gpt2}, data)["base"] for _ in range(2))
    assert first == again
    singles = [
        measured(
            quality.model_copy(update={"decoding": quality.decoding.model_copy(update={"seeds": (seed,)})}),
            {"base": gpt2},
            data,
        )
        for seed in (1, 2, 3)
    ]
    scores = torch.tensor([single["base"]["quality"]["chrf"] for single in singles], dtype=torch.double)
    assert first["quality"]["chrf"] == pytest.approx(float(scores.mean()))
    assert first["conditions"]["quality"]["std"]["chrf"] == pytest.approx(float(scores.std()))
    assert float(scores.std()) > 0
    assert first["quality"]["reference_words_mean"] == 2
    deviations = set(first["conditions"]["quality"]["std"])
    assert deviations == set(first["quality"]) - {"samples", "reference_words_mean", "reference_words_median"}
    assert first["conditions"]["quality"]["decoding"]["seeds"] == (1, 2, 3)


def test_text_without_spaces_has_no_word_perplexity(gpt2: Artifact, tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("themouse" * 400)
    quality = measured(Quality(), {"base": gpt2}, data_of(gpt2, tmp_path, test=TEXT, block=8))["base"]["quality"]
    assert quality["perplexity"] > 1
    assert "word_perplexity" not in quality
    assert re.match(r"word perplexity is too large to compute: [\d,]+ tokens per word", quality["note"])


@pytest.mark.slow
def test_seq2seq_models_generate_from_sources(bart: Artifact, bart_onnx: Artifact, folder: Path) -> None:
    data = data_of(bart, folder, eval=PAIRS)
    for num_beams in (1, 2):
        decoding = {"max_new_tokens": 8, "num_beams": num_beams}
        metrics = ["perplexity", "agreement", "bleu", "chrf"]
        quality = Quality.model_validate({"metric": metrics, "batch": 2, "decoding": decoding, "reference": "base"})
        found = measured(quality, {"base": bart, "onnx": bart_onnx}, data)
        record, onnx = found["base"], found["onnx"]["quality"]
        assert {"perplexity", "bleu", "chrf"} <= set(record["quality"])
        assert onnx["perplexity"] == pytest.approx(record["quality"]["perplexity"], rel=1e-4)
        assert onnx["agreement"] == 100
        assert onnx["samples"] == record["quality"]["samples"]
        assert any(sample["output"] for sample in onnx["samples"])
        assert not {"word_perplexity", "context", "stride"} & set(record["quality"])
        assert record["conditions"]["quality"]["split"] == "data.eval"
        assert record["conditions"]["quality"]["rows"] == 3


@pytest.mark.parametrize(
    ("written", "data", "message"),
    [
        ({}, None, "neither data.test nor data.eval"),
        ({}, {"train": TEXT}, "neither data.test nor data.eval"),
        ({"metric": "rouge"}, {"test": TEXT}, "rouge compares generated text with references, but data.test has none"),
        (
            {"metric": "rouge"},
            {"test": PROMPTS},
            "max_new_tokens: 64 after 12 tokens of data.test exceed the model's 32",
        ),
    ],
)
def test_what_cannot_be_measured_is_reported(
    gpt2: Artifact, folder: Path, written: dict[str, Any], data: dict[str, Any] | None, message: str
) -> None:
    opened = None if data is None else data_of(gpt2, folder, **data)
    with pytest.raises(DataError, match=message):
        measured(Quality.model_validate(written), {"base": gpt2}, opened)


@pytest.mark.slow
def test_beams_of_an_exported_model_give_torch_s_text(gpt2: Artifact, gpt2_onnx: Artifact, folder: Path) -> None:
    data = data_of(gpt2, folder, test=PROMPTS)
    texts = []
    for num_beams in (1, 3):
        quality = Quality.model_validate({"metric": "bleu", "decoding": {"num_beams": num_beams, "max_new_tokens": 12}})
        found = measured(quality, {"base": gpt2, "onnx": gpt2_onnx}, data)
        samples = [found[name]["quality"]["samples"] for name in ("base", "onnx")]
        assert samples[0] == samples[1]
        texts.append(samples[1])
    assert texts[0] != texts[1]


def test_both_runtimes_are_reported_the_settings_that_take_part() -> None:
    common = {"max_new_tokens": 64, "do_sample": False}
    assert Decoding().options() == common
    assert Decoding(num_beams=3).options() == common | {"num_beams": 3, "length_penalty": 1.0}
    assert Decoding(num_beams=3, length_penalty=2.0).options() == common | {"num_beams": 3, "length_penalty": 2.0}
    drawn = {"do_sample": True, "temperature": 0.5, "top_k": 7, "top_p": 0.9}
    assert Decoding(**drawn).options() == {"max_new_tokens": 64} | drawn


@pytest.mark.parametrize(
    ("decoding", "message"),
    [
        ({"temperature": 0.5}, "temperature does nothing without do_sample: true"),
        (
            {"do_sample": True, "num_beams": 3},
            "num_beams applies only to beam search, but do_sample: true samples; leave one out",
        ),
        ({"length_penalty": 2.0}, "length_penalty does nothing without num_beams above 1"),
        ({"seeds": [1, 2]}, "seeds does nothing without do_sample: true"),
    ],
)
def test_a_decoding_that_does_nothing_is_refused(decoding: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Quality.model_validate({"metric": "bleu", "decoding": decoding})
    if "seeds" not in decoding:
        with pytest.raises(ValidationError, match=message):
            SeqKd.model_validate({"decoding": decoding})
        Quality.model_validate(
            {"metric": "bleu", "decoding": {"do_sample": False, "num_beams": 2, "length_penalty": 2.0}}
        )


def test_references_must_exist_and_share_the_vocabulary(gpt2: Artifact, bart: Artifact, folder: Path) -> None:
    data = data_of(gpt2, folder, test=TEXT)
    quality = Quality.model_validate({"metric": "agreement", "reference": "bse"})
    with pytest.raises(RecipeError, match=r"quality\.reference: 'bse' is unknown\. Did you mean 'base'"):
        measured(quality, {"base": gpt2}, data)
    with pytest.raises(ValidationError, match="metric agreement needs reference, the model to compare with"):
        Quality.model_validate({"metric": "agreement"})


def with_ends(artifact: Artifact, out: Path, ends: int | list[int] | None) -> Artifact:
    """A copy in which the generation settings alone say where a row ends."""
    shutil.copytree(artifact.path, out)
    for name in ("config.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (file := out / name).exists():
            settings = json.loads(file.read_text())
            kept = {key: value for key, value in settings.items() if not key.startswith("eos_token")}
            file.write_text(json.dumps(kept | ({"eos_token_id": None} if name == "config.json" else {})))
    (out / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    return Artifact(out, artifact.manifest)


def test_both_runtimes_stop_where_the_generation_settings_say(
    gpt2: Artifact, gpt2_onnx: Artifact, tmp_path: Path
) -> None:
    prompts, decoding = [[5, 9, 12], [7, 8]], Decoding(max_new_tokens=8)
    free = subject_of(with_ends(gpt2, tmp_path / "free", None), "cpu").generate(prompts, decoding, 0)
    assert [len(row) for row in free] == [8, 8]
    for number, ends in enumerate([free[0][3], [free[0][3], free[1][5]]]):
        for kind, artifact in (("torch", gpt2), ("onnx", gpt2_onnx)):
            ended = subject_of(with_ends(artifact, tmp_path / f"{kind}{number}", ends), "cpu")
            assert ended.generate(prompts, decoding, 0) == [until_end(row, ends) for row in free], kind


def test_the_end_of_a_tokenizer_ends_a_row_too(gpt2: Artifact, tmp_path: Path) -> None:
    made = with_ends(gpt2, tmp_path / "made", [7, 9])
    assert (ends_of(gpt2, gpt2.tokenizer()), ends_of(made, gpt2.tokenizer())) == ([0], [7, 9, 0])
    assert ends_of(made, made.tokenizer()) == [7, 9]


def test_padding_and_ends() -> None:
    ids, mask = padded([[1, 2], [3]], 9, left=True)
    assert (ids.tolist(), mask.tolist()) == ([[1, 2], [9, 3]], [[1, 1], [0, 1]])
    ids, mask = padded([[1, 2], [3]], 9, left=False)
    assert (ids.tolist(), mask.tolist()) == ([[1, 2], [3, 9]], [[1, 1], [1, 0]])
    assert until_end([4, 2, 5], 2) == [4]
    assert until_end([4, 5], 2) == until_end([4, 5], None) == until_end([4, 5], [2, 3]) == [4, 5]
    assert until_end([4, 3, 2, 5], [2, 3]) == [4]


SHARED = os.environ.get("COMPRESS_SHARED", "")


@pytest.mark.skipif(not SHARED, reason="COMPRESS_SHARED does not name a directory with models/gpt2-ptb and data/ptb")
def test_a_trained_model_scores_what_its_card_says() -> None:
    """Counts of the card (54.88 over all tokens), and the first eight blocks against a pass row by row."""
    shared = Path(SHARED)
    model = adopt(shared / "models/gpt2-ptb")
    whole = data_of(model, shared / "data/ptb", test={"text": "ptb.test.txt", "strip": True}, block=256)
    assert whole.test is not None
    assert (whole.test.tokens, whole.test.words) == (98_595, 82_430)
    few = replace(whole.test, rows=whole.test.rows.select(range(8)), text=None)
    quality = measured(Quality(), {"base": model}, replace(whole, test=few))["base"]["quality"]
    torch_model: Any = model.model()
    total = 0.0
    for row in few:
        with torch.no_grad():
            logits = torch_model(torch.tensor([row["input_ids"]])).logits[0]
        total += float(F.cross_entropy(logits, torch.tensor(row["labels"]), reduction="sum"))
    assert quality["perplexity"] == pytest.approx(math.exp(total / quality["tokens"]), rel=1e-5)
    assert 40 < quality["perplexity"] < 75
