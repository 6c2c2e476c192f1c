"""Padding never changes a score: rows alone and in padded batches have one perplexity and one text, torch and ONNX."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.artifact import Artifact, adopt
from compress.data import Data
from compress.errors import DataError
from compress.generation.settings import Decoding
from compress.generation.subject import subject_of
from compress.measure.quality import Quality
from compress.onnx.export.exporter import export

from .conftest import data_of

LENGTHS = (3, 17, 1, 8, 8, 25)


@pytest.fixture(params=["torch", "onnx"])
def model(request: Any, bart: Artifact, bart_onnx: Artifact) -> Artifact:
    return bart if request.param == "torch" else bart_onnx


def drawn(size: int, seed: int) -> list[int]:
    found: list[int] = torch.randint(3, 270, (size,), generator=torch.Generator().manual_seed(seed)).tolist()
    return found


def rows_of(artifact: Artifact, folder: Path, rows: list[tuple[list[int], list[int]]]) -> Data:
    (folder / "ready.jsonl").write_text(
        "".join(json.dumps({"ids": source, "labels": target}) + "\n" for source, target in rows)
    )
    return data_of(artifact, folder, test={"json": "ready.jsonl", "input_ids": "ids", "labels": "labels"})


def exported_to(artifact: Artifact, out: Path) -> Artifact:
    artifact.config().save_pretrained(out)
    export(artifact.model(), out)
    return Artifact(out, artifact.manifest.model_copy(update={"traits": ("onnx",)}))


def figures(model: Artifact, data: Data, batch: int) -> dict[str, Any]:
    quality = Quality(metric=("perplexity", "agreement"), reference="base", batch=batch)  # type: ignore[call-arg]
    found: dict[str, Any] = quality.run({"base": model}, data=data, device="cpu", console=None)["base"]["quality"]
    return found


@pytest.mark.slow
def test_perplexity_and_agreement_do_not_depend_on_the_batch(model: Artifact, tmp_path: Path) -> None:
    rows = [(drawn(size, size), drawn(20 - size % 19, 50 + size)) for size in LENGTHS]
    padded = [(source, [*target, *[-100] * (24 - len(target))]) for source, target in rows]
    padded.insert(1, ([5, 6], [-100] * 24))
    alone, together = (figures(model, rows_of(model, tmp_path, rows), batch) for batch in (1, 6))
    filled = figures(model, rows_of(model, tmp_path, padded), 7)
    assert alone["tokens"] == together["tokens"] == filled["tokens"] == sum(len(target) for _, target in rows)
    for other in (together, filled):
        assert other["perplexity"] == pytest.approx(alone["perplexity"], rel=1e-5)
        assert (other["agreement"], other["kl"]) == (100, 0)


@pytest.fixture(scope="module")
def talkative(tiny_bart: Any, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A model whose text depends on the source and on what it said before."""
    model = tiny_bart(vocab=270, decoder_heads=2, decoder_layers=1)
    with torch.no_grad():
        model.final_logits_bias.zero_()
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.dim() > 1 else 1)
    out = tmp_path_factory.mktemp("talkative")
    model.save_pretrained(out)
    return adopt(out)


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["torch", "onnx"])
@pytest.mark.parametrize("num_beams", [1, 4])
def test_text_does_not_depend_on_the_batch(talkative: Artifact, tmp_path: Path, runtime: str, num_beams: int) -> None:
    """Rows end early, late, and not at all."""
    subject: Any = subject_of(talkative if runtime == "torch" else exported_to(talkative, tmp_path), "cpu")
    decoding = Decoding(max_new_tokens=12, num_beams=num_beams)
    sources = [drawn(size, 7 * seed + size) for seed in range(2) for size in LENGTHS]
    free = [subject.generate([source], decoding, 0)[0] for source in sources]
    subject.ends = sorted({free[0][2], free[1][5], free[2][9]})
    alone = [subject.generate([source], decoding, 0)[0] for source in sources]
    assert len({len(row) for row in alone}) > 2 and len(set(map(tuple, alone))) > len(alone) // 2
    assert subject.generate(sources, decoding, 0) == alone


@pytest.mark.parametrize("metric", [("perplexity",), ("agreement",)])
def test_a_batch_whose_targets_are_all_padding_stops(model: Artifact, tmp_path: Path, metric: Any) -> None:
    data = rows_of(model, tmp_path, [([5, 6, 7], [8, 2]), ([5, 6], [-100, -100])])
    reference = "base" if metric == ("agreement",) else None
    quality = Quality(metric=metric, reference=reference, batch=1)  # type: ignore[call-arg]
    with pytest.raises(DataError, match=r"data\.test: no token of a batch is scored"):
        quality.run({"base": model}, data=data, device="cpu", console=None)


def test_answers_may_fill_the_context_and_no_more(model: Artifact, folder: Path) -> None:
    pairs = {"json": "rows.jsonl", "source": "question", "target": "answer"}
    data = data_of(model, folder, test=pairs)
    quality = Quality(metric="bleu", decoding={"max_new_tokens": 32})  # type: ignore[call-arg, arg-type]
    found = quality.run({"base": model}, data=data, device="cpu", console=None)["base"]["quality"]
    assert found["samples"]
    quality = Quality(metric="bleu", decoding={"max_new_tokens": 33})  # type: ignore[call-arg, arg-type]
    with pytest.raises(DataError, match=r"max_new_tokens: 33, but the model's responses have at most 32 tokens"):
        quality.run({"base": model}, data=data, device="cpu", console=None)
