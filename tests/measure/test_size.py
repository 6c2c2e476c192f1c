from pathlib import Path

import pytest
import torch

from compress.artifact import Artifact, save_model
from compress.errors import RecipeError
from compress.measure.size import Size
from compress.models import family_of
from compress.surgery.cut import cut


def stored(artifact: Artifact) -> int:
    """Numbers in a stock checkpoint."""
    return sum(tensor.numel() for tensor in artifact.model().state_dict(keep_vars=True).values())


def test_parameters_are_those_of_the_model_with_shared_ones_once(gpt2: Artifact, bart: Artifact) -> None:
    found = Size().run({"gpt2": gpt2, "bart": bart}, data=None, device="cpu", console=None)
    embedding = gpt2.config().vocab_size * gpt2.config().n_embd
    assert found["gpt2"]["parameters"] == stored(gpt2) - embedding
    model = bart.model()
    unique = sum(parameter.numel() for parameter in model.parameters()) + model.get_buffer("final_logits_bias").numel()
    assert found["bart"]["parameters"] == unique


def test_bytes_count_files_and_ratios_refer_to_the_first_model(gpt2: Artifact, gpt2_onnx: Artifact) -> None:
    record = Size(of=("onnx",)).run({"base": gpt2, "onnx": gpt2_onnx}, data=None, device="cpu", console=None)["onnx"]
    files = {path.name: path.stat().st_size for path in gpt2_onnx.path.iterdir()}
    assert record["files"] == files
    assert record["bytes_total"] == sum(files.values())
    assert record["bytes"] == sum(size for name, size in files.items() if ".onnx" in name) > 0
    assert (
        record["parameters"] == Size().run({"base": gpt2}, data=None, device="cpu", console=None)["base"]["parameters"]
    )
    assert record["compression_ratio"] == pytest.approx(4 * record["parameters"] / record["bytes"])
    assert record["compression_ratio_fp16"] == pytest.approx(record["compression_ratio"] / 2)


@pytest.mark.parametrize("axes", ["hidden heads ffn", "ffn"], ids=["stock shape", "no stock shape"])
def test_a_cut_model_has_the_parameters_it_kept(gpt2: Artifact, tmp_path: Path, axes: str) -> None:
    model = gpt2.model()
    keep = {
        axis.name: torch.arange(axis.size // 2)
        for axis in family_of(model.config).axes(model.config)
        if axis.kind in axes.split() and (len(axes) > 3 or axis.name.startswith("layer.0"))
    }
    cut(model, gpt2.family(), keep)
    save_model(model, gpt2, tmp_path)
    kept = {name: units.tolist() for name, units in keep.items()}
    manifest = gpt2.manifest.model_copy(update={"kept": kept, "traits": ("pruned",)})
    artifacts = {"base": gpt2, "small": Artifact(tmp_path, manifest)}
    record = Size().run(artifacts, data=None, device="cpu", console=None)
    assert record["small"]["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert record["small"]["parameters"] < record["base"]["parameters"]


def test_an_unknown_name_is_refused(gpt2: Artifact) -> None:
    with pytest.raises(RecipeError, match=r"size\.of: 'bass' is unknown\. Did you mean 'base'"):
        Size(of=("bass",)).run({"base": gpt2}, data=None, device="cpu", console=None)
