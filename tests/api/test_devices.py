"""Models stay on their devices. There may be no second device here, so some tests say that a model lies on one."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from torch import nn

import compress
from compress.api import asked, results, saving
from compress.api.arguments import require_device
from compress.artifact import Artifact
from compress.engine import fitting, models
from compress.errors import ModelError

ROWS = [{"input_ids": [3 + (5 * i + j) % 60 for j in range(10)]} for i in range(8)]
QUIET: dict[str, Any] = {"steps": 2, "batch": 4, "progress": False}
SECOND = torch.device("cuda", 1)


@pytest.fixture
def far(tiny_gpt2: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A teacher that says that it lies on a second device, and lists where it is moved to."""
    teacher = tiny_gpt2()
    teacher.places = [SECOND]
    monkeypatch.setattr(teacher, "to", lambda device: teacher.places.append(torch.device(device)))
    real = models.device_of
    for module in (models, fitting):
        monkeypatch.setattr(module, "device_of", lambda model: model.places[-1] if model is teacher else real(model))
    return teacher


def test_a_teacher_on_another_device_comes_and_goes_back(far: Any, tiny_gpt2: Any) -> None:
    compress.distill(tiny_gpt2(), teacher=far, data=ROWS, **QUIET)
    assert far.places == [SECOND, torch.device("cpu"), SECOND]
    compress.learn_masks(tiny_gpt2(), ROWS, teacher=far, **QUIET)
    assert far.places[2:] == [SECOND, torch.device("cpu"), SECOND]


def test_a_teacher_goes_back_from_a_training_that_fails(
    far: Any, tiny_gpt2: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(fitting, "train", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        compress.distill(tiny_gpt2(), teacher=far, data=ROWS, **QUIET)
    assert far.places == [SECOND, torch.device("cpu"), SECOND]


def test_a_model_that_was_moved_goes_back_also_after_an_error() -> None:
    model = nn.Linear(2, 2, device="meta").eval()
    with pytest.raises(RuntimeError, match="broken"), models.undisturbed(model):
        model.to_empty(device="cpu").train()
        raise RuntimeError("broken")
    assert models.device_of(model).type == "meta" and not model.training


def test_a_model_that_stays_is_not_touched(tiny_gpt2: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_gpt2()
    before = [parameter.data_ptr() for parameter in model.parameters()]
    compress.finetune(model, ROWS, **QUIET)
    assert [parameter.data_ptr() for parameter in model.parameters()] == before


def test_the_index_of_a_device_is_kept(tiny_gpt2: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = compress.save(tiny_gpt2(), tmp_path / "saved")
    monkeypatch.setattr(asked, "device_of", lambda model: SECOND)
    place = asked.Asked(ROWS, None, None, 0, False, {}).place(tiny_gpt2(), "model")
    assert place.device == SECOND
    with monkeypatch.context() as there:
        there.setattr(torch, "empty", lambda *_, device: SimpleNamespace(device=torch.device(device)))
        assert require_device(SECOND) == require_device("cuda:1") == "cuda:1"
    opened: list[str] = []
    real = Artifact.model
    monkeypatch.setattr(saving, "require_device", str)
    monkeypatch.setattr(Artifact, "model", lambda self, device, **rest: opened.append(device) or real(self, **rest))
    compress.load(saved, device=SECOND)
    assert opened == ["cuda:1"]


def test_a_model_on_several_devices_or_none_is_refused(tiny_gpt2: Any) -> None:
    split = tiny_gpt2()
    split.transformer.h[1].to("meta")
    with pytest.raises(ModelError, match="^model: has parameters on cpu and meta; give a model with all on one device"):
        compress.finetune(split, ROWS, **QUIET)
    with pytest.raises(ModelError, match="^teacher: has parameters on cpu and meta"):
        compress.distill(tiny_gpt2(), teacher=split, data=ROWS, **QUIET)
    for call in (compress.score, compress.quantize_, lambda model: compress.drop_layers(model, 1)):
        with pytest.raises(ModelError, match="^model: has parameters on meta; give a model with all on one device"):
            call(tiny_gpt2().to("meta"))


def test_what_needs_the_cpu_says_so(tiny_gpt2: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (results, saving):
        monkeypatch.setattr(module, "device_of", lambda model: SECOND)
    with pytest.raises(ModelError, match=r"^models: model 0: is on cuda:1; .* give model\.cpu\(\)"):
        compress.benchmark([tiny_gpt2()], rounds=1)
    with pytest.raises(ModelError, match=r"^model: is on cuda:1; .* give model\.cpu\(\)"):
        compress.export_onnx(tiny_gpt2(), tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


def test_training_follows_the_model_and_not_the_device_that_accelerate_holds(
    tiny_gpt2: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = tiny_gpt2()
    second = copy.deepcopy(first)
    compress.finetune(first, ROWS, **QUIET)
    for held in (PartialState, AcceleratorState):  # as after a training on another device, in this process
        monkeypatch.setitem(held._shared_state, "device", torch.device("meta"))
    compress.finetune(second, ROWS, **QUIET)
    assert all(torch.equal(one, other) for one, other in zip(first.parameters(), second.parameters(), strict=True))
