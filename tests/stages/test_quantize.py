"""The quantize stage: packed directories that reload exactly, fail loudly elsewhere, and training that helps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from compress.artifact import QUANTIZED, Artifact, Step, adopt, seal
from compress.data import Data, DataSpec, ModelInterface, Source, open_data
from compress.errors import DataError
from compress.stages.quantize import Quantize
from compress.stages.stage import Context, Result, Shape


def stage_of(bits: int = 2, *, steps: int = 0, **changes: Any) -> Quantize:
    train = {"steps": steps, "batch": 4, "precision": "fp32", "lr": 1e-2, "keep": "last", **changes.pop("train", {})}
    config = {"weights": {"bits": bits}, "embedding": {"bits": bits}, "train": train, **changes}
    return Quantize.model_validate(config)


def run(stage: Quantize, source: Artifact, directory: Path, context: Context) -> tuple[Artifact, Result]:
    partial = directory / "partial"
    partial.mkdir(parents=True)
    result = stage.run(source, partial, context)
    step = Step(
        stage="q", type=stage.type, version=stage.version, config=stage.model_dump(mode="json"), seed=0, inputs={},
        packages={}, seconds=0.0, coverage=result.coverage.model_dump(), metrics=dict(result.metrics),
    )  # fmt: skip
    traits, kept = sorted(result.traits), result.kept
    sealed = seal(
        partial, directory / "q", parent=source, traits=traits, step=step, kept=kept, quantization=result.quantization
    )
    return adopt(sealed.path), result


@pytest.fixture
def base(tmp_path: Path, tiny_gpt2: Any) -> Artifact:
    tiny_gpt2(layers=1).save_pretrained(tmp_path / "base")
    return adopt(tmp_path / "base")


@pytest.fixture
def data(tmp_path: Path, base: Artifact) -> Data:
    rows = [{"input_ids": [(3 * i + j) % 67 for j in range(12)]} for i in range(32)]
    (tmp_path / "rows.json").write_text("\n".join(json.dumps(row) for row in rows))
    source = Source.model_validate({"json": "rows.json", "input_ids": "input_ids"})
    spec = DataSpec(train=source, eval=source)
    return open_data(spec, tokenizer=None, model=ModelInterface.of(base.config()), base=tmp_path)


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})
    with torch.no_grad():
        found: torch.Tensor = model(**inputs).logits
    return found


STOCK = {
    "gpt2": AutoModelForCausalLM,
    "bart": AutoModelForSeq2SeqLM,
    "mbart": AutoModelForSeq2SeqLM,
    "llama": AutoModelForCausalLM,
}


@pytest.mark.slow
@pytest.mark.parametrize(("family", "stock"), STOCK.items())
def test_packed_directory(tmp_path: Path, request: pytest.FixtureRequest, family: str, stock: Any) -> None:
    request.getfixturevalue(f"tiny_{family}")(layers=1).save_pretrained(tmp_path / "base")
    base = adopt(tmp_path / "base")
    sealed, result = run(stage_of(), base, tmp_path / "run", Context(models={"base": base}))
    assert sealed.traits == {"quantized"} and sealed.manifest.quantization == result.quantization
    names = {file.name for file in sealed.path.iterdir()}
    assert QUANTIZED in names and "config.json" in names and not any("model.safetensors" in name for name in names)
    with pytest.raises(OSError, match=r"model\.safetensors"):
        stock.from_pretrained(sealed.path)
    ids = torch.arange(3, 12)[None]
    plain = sealed.model(dequantize=True)
    plain.save_pretrained(tmp_path / "plain")
    again = stock.from_pretrained(tmp_path / "plain").eval()
    assert torch.equal(logits(again, ids), logits(plain, ids))
    torch.testing.assert_close(logits(sealed.model(), ids), logits(plain, ids), rtol=0.1, atol=0.1)


def test_bytes_are_those_on_disk(tmp_path: Path, base: Artifact) -> None:
    sealed, result = run(stage_of(), base, tmp_path / "run", Context(models={}))
    with safe_open(sealed.path / QUANTIZED, "pt") as file:
        tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
    assert result.coverage.bytes_after == sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    scales = 4 * (67 + 4)
    assert result.metrics["bytes_without_scales"] == result.coverage.bytes_after - scales
    assert result.coverage.modules_touched == 6


STORE = {"scales": "float16", "positions": "float16"}


@pytest.mark.parametrize("granularity", ["tensor", "group"])
def test_float16_on_disk(tmp_path: Path, base: Artifact, granularity: str) -> None:
    weights = {"bits": 2, "granularity": granularity}
    plain, _ = run(stage_of(weights=weights), base, tmp_path / "plain", Context(models={}))
    sealed, result = run(stage_of(weights=weights, store=STORE), base, tmp_path / "half", Context(models={}))
    exact, tensors = (_tensors(artifact.path / QUANTIZED) for artifact in (plain, sealed))
    assert result.coverage.bytes_after == sum(tensor.nbytes for tensor in tensors.values())
    assert not result.coverage.note and plain.digest != sealed.digest
    for name in ("transformer.wte.scale", "transformer.wpe.weight"):
        assert torch.equal(tensors[name], exact[name].half())
    model: Any = sealed.model()
    assert torch.equal(model.transformer.wpe.weight, tensors["transformer.wpe.weight"].float())
    codes = {name: tensor for name, tensor in tensors.items() if name.endswith(".codes")}
    assert all(torch.equal(tensor, exact[name]) for name, tensor in codes.items())


@pytest.mark.slow
def test_what_float16_does_not_hold_is_reported(tmp_path: Path, tiny_gpt2: Any) -> None:
    model = tiny_gpt2(layers=1)
    with torch.no_grad():
        model.transformer.wte.weight[3] *= 1e-6
    model.save_pretrained(tmp_path / "base")
    base = adopt(tmp_path / "base")
    sealed, result = run(stage_of(3, store=STORE), base, tmp_path / "run", Context(models={}))
    assert result.coverage.note == (
        "3-bit codes take 4 bits; float16 cannot represent transformer.wte.scale; stored as float32"
    )
    tensors = _tensors(sealed.path / QUANTIZED)
    assert tensors["transformer.wte.scale"].dtype == torch.float32
    assert tensors["transformer.wpe.weight"].dtype == torch.float16
    assert result.coverage.bytes_after == sum(tensor.nbytes for tensor in tensors.values())
    assert sealed.model() is not None


@pytest.mark.parametrize(("weights", "embedding", "noted"), [(2, 4, False), (3, 4, True), (4, 3, True), (8, 2, False)])
def test_three_bits_are_noted(tmp_path: Path, base: Artifact, weights: int, embedding: int, noted: bool) -> None:
    stage = stage_of(weights={"bits": weights}, embedding={"bits": embedding})
    _, result = run(stage, base, tmp_path / "run", Context(models={}))
    assert result.coverage.note == ("3-bit codes take 4 bits" if noted else "")


def test_a_stage_that_stores_float32_says_nothing_of_it() -> None:
    """What was made before the option came keeps its key."""
    assert "store" not in stage_of().model_dump(mode="json")
    assert "store" not in stage_of(store={"scales": "float32"}).model_dump(mode="json")
    half = stage_of(store={"scales": "float16"})
    assert half.model_dump(mode="json")["store"] == {"scales": "float16", "positions": "float32"}
    assert Quantize.model_validate(half.model_dump(mode="json")) == half


def test_details_tell_how_it_went(tmp_path: Path, base: Artifact) -> None:
    sealed, result = run(stage_of(), base, tmp_path / "run", Context(models={}))
    details = json.loads((sealed.path / "details.json").read_text())
    assert {entry["module"] for entry in details["histograms"]} >= {"transformer.wte", "transformer.h.0.mlp.c_fc"}
    assert details["embedding_cosine"]["quantized"] == pytest.approx(result.metrics["embedding_cosine"])
    assert details["embedding_cosine"]["source"] != details["embedding_cosine"]["quantized"]


@pytest.mark.slow
@pytest.mark.parametrize("granularity", ["tensor", "group"])
@pytest.mark.parametrize("method", ["dynamic_scaling", "pact", "lsq", "laq", "round_to_nearest"])
def test_training_recovers(tmp_path: Path, base: Artifact, data: Data, method: str, granularity: str) -> None:
    weights = {"bits": 2, "method": method, "granularity": granularity}
    stage = stage_of(steps=30, weights=weights, terms=["cross_entropy"], train={"scale_lr": 1e-3})
    sealed, _ = run(stage, base, tmp_path / "run", Context(models={}, data=data, bar=False))
    lines = [json.loads(line) for line in (sealed.path / "history.jsonl").read_text().splitlines()]
    curve = [line["loss"] for line in lines if "loss" in line]
    assert sum(curve[-5:]) < 0.8 * sum(curve[:5])
    last = [line["eval_nll"] for line in lines if "eval_nll" in line][-1]
    batch = next(iter(data.eval.loader(32)))  # type: ignore[union-attr]
    scored = batch["labels"] >= 0
    found = logits(sealed.model(), batch["input_ids"])[scored]
    loss = torch.nn.functional.cross_entropy(found, batch["labels"][scored])
    assert float(loss) == pytest.approx(last, abs=1e-4)  # what was evaluated in training is what was packed


@pytest.mark.slow
def test_the_papers_terms_train_scales_and_weights(tmp_path: Path, base: Artifact, data: Data) -> None:
    context = Context(models={"base": base}, data=data, bar=False)
    before, _ = run(stage_of(), base, tmp_path / "ptq", context)
    after, _ = run(stage_of(steps=2, teacher="base"), base, tmp_path / "qat", context)
    ours, theirs = (_tensors(artifact.path / QUANTIZED) for artifact in (before, after))
    assert not torch.equal(ours["transformer.wte.scale"], theirs["transformer.wte.scale"])
    assert not torch.equal(ours["transformer.h.0.mlp.c_fc.codes"], theirs["transformer.h.0.mlp.c_fc.codes"])
    assert not torch.equal(ours["transformer.ln_f.weight"], theirs["transformer.ln_f.weight"])


@pytest.mark.slow
def test_the_norms_gradient_changes_training_alone(tmp_path: Path, base: Artifact, data: Data) -> None:
    context = Context(models={}, data=data, bar=False)

    def digest(norm_gradient: bool, **rates: float) -> str:
        weights = {"bits": 2, "norm_gradient": norm_gradient}
        stage = stage_of(steps=3, weights=weights, terms=["cross_entropy"], train=rates)
        return run(stage, base, tmp_path / f"{len(rates)}-{norm_gradient}", context)[0].digest

    assert digest(True, lr=0.0, scale_lr=0.0) == digest(False, lr=0.0, scale_lr=0.0)
    assert digest(True) != digest(False)
    with pytest.raises(ValidationError, match="weights.norm_gradient needs training, but train.steps is 0"):
        stage_of(steps=0, weights={"bits": 2, "norm_gradient": True})


@pytest.mark.slow
def test_same_seed_same_bytes(tmp_path: Path, base: Artifact, data: Data) -> None:
    context = Context(models={"base": base}, data=data, bar=False)
    stage = stage_of(steps=2, teacher="base", noise_p=0.5)
    assert len({run(stage, base, tmp_path / name, context)[0].digest for name in ("a", "b")}) == 1


def test_training_without_data_is_refused(tmp_path: Path, base: Artifact) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match=r"no data\.train"):
        stage_of(steps=2, terms=["cross_entropy"]).run(base, tmp_path / "out", Context(models={}))


def test_problems_name_the_missing_teacher(base: Artifact) -> None:
    shape = Shape(name="base", config=base.config(), sizes=base.sizes(), traits=frozenset(), root="base")
    assert "needs a teacher" in next(stage_of(steps=2).problems(shape, None)).text
    assert not list(stage_of().problems(shape, None))


def test_settings_that_disagree_are_refused() -> None:
    with pytest.raises(ValidationError, match="ternary"):
        stage_of(4, weights={"bits": 4, "method": "twn"})


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
