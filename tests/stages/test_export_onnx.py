"""The export stage: what it writes, what it refuses, and that it opens what the other stages make."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from compress.artifact import QUANTIZED, Artifact, Step, adopt, save_model, seal
from compress.errors import ParityError
from compress.models.families.gpt2 import GPT2
from compress.models.scratch import train_bpe
from compress.models.stock_files import copy_settings
from compress.onnx.runtime import Runtime
from compress.stages.export_onnx import ExportOnnx
from compress.stages.stage import Context, Result, Shape
from compress.surgery.coverage import owners
from compress.surgery.cut import cut
from compress.surgery.quantization import Quantization, packed_state, quantize


def run(stage: ExportOnnx, source: Artifact, out: Path) -> Result:
    out.mkdir()
    return stage.run(source, out, Context(models={}))


def sealed(directory: Path, parent: Artifact, **facts: Any) -> Artifact:
    step = Step(stage="s", type="s", version=1, config={}, seed=0, inputs={}, packages={}, seconds=0.0)
    return seal(directory, directory.with_name(directory.name + "-sealed"), parent=parent, step=step, **facts)


@pytest.fixture
def base(tmp_path: Path, tiny_gpt2: Any) -> Artifact:
    tiny_gpt2().save_pretrained(tmp_path / "base")
    return adopt(tmp_path / "base")


def quantized(base: Artifact, directory: Path, granularity: str | None, *, bits: int = 4, **store: Any) -> Artifact:
    activations = granularity and {"granularity": granularity}
    config = {"weights": {"bits": bits}, "embedding": {"bits": 4}, "activations": activations, "store": store}
    settings, model = Quantization.model_validate(config), base.model()
    quantize(model, base.family(), settings)
    tensors, spec = packed_state(model, settings.store)
    copy_settings(base.path, directory)
    save_file(tensors, directory / QUANTIZED)
    return sealed(directory, base, traits=["quantized"], kept={}, quantization=spec)


def shape_of(artifact: Artifact) -> Shape:
    spec = artifact.manifest.quantization
    activations = spec.activations if spec else None
    return Shape("a", artifact.config(), artifact.sizes(), artifact.traits, root="a", activations=activations)


@pytest.mark.slow
def test_a_float_model(base: Artifact, tmp_path: Path) -> None:
    result = run(ExportOnnx(), base, tmp_path / "out")
    assert result.traits == {"onnx"}
    assert result.quantization is None
    assert result.coverage.modules_touched == result.coverage.modules_total > 0
    assert result.coverage.bytes_after == (tmp_path / "out" / "model.onnx").stat().st_size
    assert result.metrics["max_logit_error"] <= result.metrics["limit"]
    parity = json.loads((tmp_path / "out" / "details.json").read_text())["parity"]
    assert parity["max_logit_error"] == result.metrics["max_logit_error"]
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        *("config.json", "generation_config.json", "model.onnx", "details.json")
    }
    ids = torch.randint(1, 67, (1, 5))
    with torch.no_grad():
        expected = base.model()(ids).logits
    torch.testing.assert_close(torch.from_numpy(Runtime.open(tmp_path / "out").logits(ids.numpy())), expected)


@pytest.mark.slow
def test_the_parts_of_an_older_tokenizer_become_one_file(base: Artifact, tmp_path: Path) -> None:
    tokenizer = train_bpe(["the cat sat on the mat"] * 3, 262, GPT2)
    tokenizer.backend_tokenizer.model.save(str(base.path))
    run(ExportOnnx(), adopt(base.path), tmp_path / "out")
    text = "the cat, ünïcode"
    written = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert written.encode(text).ids == adopt(base.path).tokenizer()(text)["input_ids"]
    assert written.decode(written.encode(text).ids) == text


@pytest.mark.slow
def test_a_quantized_model_keeps_its_spec(base: Artifact, tmp_path: Path) -> None:
    source = quantized(base, tmp_path / "q", "block")
    assert not list(ExportOnnx().problems(shape_of(source), None))
    result = run(ExportOnnx(), source, tmp_path / "out")
    assert result.traits == {"quantized", "onnx"}
    assert result.quantization == source.manifest.quantization
    assert result.coverage.bytes_after < (base.path / "model.safetensors").stat().st_size / 2
    # as many as the float model has: embeddings, positions, the head, normalizations, and four products a layer
    config, modules = base.config(), owners(base.model())
    assert len(modules) == 2 + 1 + 1 + config.n_layer * (2 + 4)
    assert result.coverage.modules_touched == result.coverage.modules_total == len(modules)
    tables = json.loads((tmp_path / "out" / "details.json").read_text())["tables"]
    assert tables == ["transformer.wte"]  # looked up only; the head is a product


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "note"), [(3, "3-bit codes take 4 bits"), (2, "")])
def test_three_bits_are_noted(base: Artifact, tmp_path: Path, bits: int, note: str) -> None:
    assert (
        run(ExportOnnx(), quantized(base, tmp_path / "q", "block", bits=bits), tmp_path / "out").coverage.note == note
    )


@pytest.mark.slow
@pytest.mark.parametrize("granularity", ["block", "tensor"])
def test_float16_is_kept(base: Artifact, tmp_path: Path, granularity: str) -> None:
    source = quantized(base, tmp_path / "q", granularity, scales="float16", positions="float16")
    result = run(ExportOnnx(activations="exact" if granularity == "block" else "replace"), source, tmp_path / "out")
    assert result.quantization is not None and source.manifest.quantization is not None
    assert result.quantization.half == source.manifest.quantization.half != {}
    stored = onnx.load(tmp_path / "out" / "model.onnx").graph.initializer
    halves = {tensor.name for tensor in stored if tensor.data_type == onnx.TensorProto.FLOAT16}
    assert halves == {"transformer.wpe.weight", "transformer.wte.scales"}


@pytest.mark.slow
def test_activations_per_tensor_must_be_replaced(base: Artifact, tmp_path: Path) -> None:
    source = quantized(base, tmp_path / "q", "tensor")
    (problem,) = ExportOnnx().problems(shape_of(source), None)
    assert str(problem) == (
        "activations: exact is impossible, because the kernel quantizes per block and this model per tensor; "
        "allowed: replace, float, or granularity: block in the activations of quantize"
    )
    with pytest.raises(ParityError):
        run(ExportOnnx(), source, tmp_path / "exact")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("granularity", "activations", "taken"),
    [
        *((None, "exact", "none"), (None, "replace", "block"), ("block", "exact", "block")),
        *(("block", "float", "none"), ("tensor", "replace", "block"), ("tensor", "float", "none")),
    ],
)
def test_what_inputs_of_products_become(
    base: Artifact, tmp_path: Path, granularity: str | None, activations: Any, taken: str
) -> None:
    """The record says what the graph computes, and so does the torch model that the record makes of the codes."""
    source = quantized(base, tmp_path / "q", granularity)
    stage = ExportOnnx(activations=activations)
    assert not list(stage.problems(shape_of(source), None))
    result = run(stage, source, tmp_path / "out")
    assert result.quantization is not None
    assert result.quantization.activations == taken
    manifest = source.manifest.model_copy(update={"quantization": result.quantization})
    ids = torch.randint(1, 67, (1, 5))
    with torch.no_grad():
        expected = replace(source, manifest=manifest).model()(ids).logits
        otherwise = source.model()(ids).logits
    logits = torch.from_numpy(Runtime.open(tmp_path / "out").logits(ids.numpy()))
    if taken == "none":  # no step of rounding that a sum in another order could tip
        torch.testing.assert_close(logits, expected)
    if activations != "exact":
        assert (logits - expected).abs().max() < (logits - otherwise).abs().max() / 2
    embedding = next(each for each in result.quantization.matrices if each.module == "transformer.wte")
    assert embedding.activations == "none"


def test_sizes_without_a_stock_class(base: Artifact, tmp_path: Path) -> None:
    model = base.model()
    keep = {"layer.0.heads": [1, 2], "layer.1.ffn": list(range(9))}
    cut(model, base.family(), {axis: torch.tensor(units) for axis, units in keep.items()})
    save_model(model, base, tmp_path / "pruned")
    source = sealed(tmp_path / "pruned", base, traits=["pruned"], kept=keep)
    result = run(ExportOnnx(), source, tmp_path / "out")
    assert result.kept == keep
    assert "opens only in compress.onnx.runtime, because no transformers class has this shape" in result.coverage.note
    ids = torch.randint(1, 67, (1, 5))
    with torch.no_grad():
        expected = model(ids).logits
    torch.testing.assert_close(torch.from_numpy(Runtime.open(tmp_path / "out").logits(ids.numpy())), expected)


def test_what_check_can_see(base: Artifact) -> None:
    shape = shape_of(base)
    assert not list(ExportOnnx().problems(shape, None))
    packed = replace(shape, traits=frozenset({"quantized"}), activations="block")
    floats = replace(packed, activations="none")
    (problem,) = ExportOnnx(graph="plain").problems(packed, None)
    assert str(problem).startswith("graph: plain supports only float weights")
    for source, allowed in ((shape, "exact"), (packed, "exact, float")):
        (problem,) = ExportOnnx(activations="replace").problems(source, None)
        assert str(problem) == f"activations: replace has nothing to replace; allowed: {allowed}"
    for source in (shape, floats):
        (problem,) = ExportOnnx(activations="float").problems(source, None)
        assert str(problem).startswith("activations: float changes nothing")
    assert not list(ExportOnnx(head="split").problems(packed, None))
    (problem,) = ExportOnnx(head="split").problems(shape, None)
    assert str(problem).startswith("head: split needs packed codes")
    shape.config.tie_word_embeddings = False
    (problem,) = ExportOnnx(head="split").problems(packed, None)
    assert str(problem).startswith("head: split has nothing to split")
    shape.config.activation_function = "prelu"
    (problem,) = ExportOnnx().problems(shape, None)
    assert str(problem).startswith("activation function 'prelu' cannot be exported")
