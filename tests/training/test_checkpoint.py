"""Checkpoints hold all that the next step depends on, once, and only whole ones are found."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from compress.training.checkpoint import Checkpoints, Progress, unique_state


def _model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 5))
    model[3].weight.data = model[3].weight.data.clone()
    model.add_module("tied", nn.Linear(5, 4))
    model.tied.weight = model[0].weight  # type: ignore[union-attr]
    return model


def _optimizer(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    biases = [p for p in model.parameters() if p.ndim == 1]
    weights = [p for p in model.parameters() if p.ndim == 2]
    return torch.optim.AdamW([{"params": biases, "lr": 1e-2}, {"params": weights, "lr": 1e-3}], **options)


def _step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.randn(6, 5)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"amsgrad": True}])
def test_a_restored_run_goes_on_bit_for_bit(options: dict[str, Any], tmp_path: Path) -> None:
    model = _model()
    optimizer = _optimizer(model, **options)
    for _ in range(3):
        _step(model, optimizer)
    progress = Progress(step=3, best_nll=0.1 + 0.2, best_step=2)
    Checkpoints(tmp_path / "c").save(model, optimizer, progress)
    _step(model, optimizer)

    again = _model()
    other = _optimizer(again, **options)
    torch.manual_seed(99)
    assert Checkpoints(tmp_path / "c").restore(again, other) == progress
    _step(again, other)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert again.get_parameter("tied.weight") is again.get_parameter("0.weight")


def test_only_the_newest_checkpoint_stays(tmp_path: Path) -> None:
    model = _model()
    optimizer, checkpoints = _optimizer(model), Checkpoints(tmp_path)
    assert checkpoints.latest() is None and checkpoints.restore(model, optimizer) is None
    for step in (9, 10, 10, 100):
        checkpoints.save(model, optimizer, Progress(step=step))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000100"]
    assert checkpoints.latest() == tmp_path / "step-00000100"


def test_a_checkpoint_that_was_cut_short_is_not_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model()
    optimizer, checkpoints = _optimizer(model), Checkpoints(tmp_path)
    checkpoints.save(model, optimizer, Progress(step=1))

    def full(*_: object) -> None:
        raise OSError("no space left on disk")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match="no space"):
            checkpoints.save(model, optimizer, Progress(step=2))
    assert checkpoints.latest() == tmp_path / "step-00000001"
    checkpoints.save(model, optimizer, Progress(step=2))
    assert checkpoints.latest() == tmp_path / "step-00000002"


FILES = ["model.safetensors", "optimizer.safetensors", "random.safetensors", "progress.json"]


def _two(directory: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Checkpoints, nn.Module, torch.optim.Optimizer]:
    """Checkpoints of the steps 1 and 2, as when the power goes before the older one is dropped."""
    model = _model()
    optimizer, checkpoints = _optimizer(model), Checkpoints(directory)
    _step(model, optimizer)
    checkpoints.save(model, optimizer, Progress(step=1))
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda *_, **__: None)
        checkpoints.save(model, optimizer, Progress(step=2))
    return checkpoints, model, optimizer


def _tear(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "zeros": bytes(len(content))}[how])


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["cut", "empty", "zeros", "gone"])
def test_a_torn_checkpoint_gives_way_to_the_one_before(
    name: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints, model, optimizer = _two(tmp_path, monkeypatch)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-00000001", "step-00000002"]
    _tear(tmp_path / "step-00000002" / name, how)
    reported: list[str] = []
    assert checkpoints.restore(model, optimizer, report=reported.append) == Progress(step=1)
    assert len(reported) == 1 and "\n" not in reported[0]
    assert reported[0].startswith(f"{tmp_path / 'step-00000002'} cannot be read ({name}: ")
    assert checkpoints.latest() == tmp_path / "step-00000001"


def test_without_a_whole_checkpoint_training_starts_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints, model, optimizer = _two(tmp_path, monkeypatch)
    for path in tmp_path.iterdir():
        _tear(path / "progress.json", "cut")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    reported: list[str] = []
    assert checkpoints.restore(model, optimizer, report=reported.append) is None
    assert len(reported) == 2
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    checkpoints.save(model, optimizer, Progress(step=1))  # an earlier step than the torn ones had
    assert checkpoints.restore(model, optimizer, report=reported.append) == Progress(step=1)


@pytest.mark.parametrize("how", ["cut", "gone"])
def test_a_checkpoint_is_worth_nothing_without_its_best_weights(how: str, tmp_path: Path) -> None:
    model = _model()
    optimizer, checkpoints = _optimizer(model), Checkpoints(tmp_path)
    checkpoints.save(model, optimizer, Progress(step=1, best_nll=2.0, best_step=1))
    checkpoints.keep_best(model)
    _tear(tmp_path / "best.safetensors", how)
    reported: list[str] = []
    assert checkpoints.restore(model, optimizer, report=reported.append) and reported == []
    assert checkpoints.restore(model, optimizer, best=True, report=reported.append) is None
    assert reported[0].startswith(f"{tmp_path / 'step-00000001'} cannot be read (best.safetensors: ")


def test_a_checkpoint_is_on_the_disk_before_it_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: set[str] = set()
    fsync, replace = os.fsync, os.replace

    def renamed(source: Path, target: Path) -> None:
        whole = {path.name for path in source.iterdir()} if source.is_dir() else set()
        assert synced >= {source.name, *whole}
        replace(source, target)

    monkeypatch.setattr(os, "fsync", lambda f: (synced.add(Path(os.readlink(f"/proc/self/fd/{f}")).name), fsync(f)))
    monkeypatch.setattr(os, "replace", renamed)
    model = _model()
    Checkpoints(tmp_path / "c").save(model, _optimizer(model), Progress(step=1))
    Checkpoints(tmp_path / "c").keep_best(model)
    assert synced >= {*FILES, "c"}


def test_the_best_weights_come_back(tmp_path: Path) -> None:
    model = _model()
    checkpoints = Checkpoints(tmp_path)
    checkpoints.keep_best(model)
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    _step(model, _optimizer(model))
    checkpoints.restore_best(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, kept[name]), name
    assert [path.name for path in tmp_path.iterdir()] == ["best.safetensors"]


def test_shared_tensors_are_written_once_and_lacking_ones_are_named(tmp_path: Path) -> None:
    model = _model()
    assert "tied.weight" not in unique_state(model) and "1.running_mean" in unique_state(model)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.keep_best(model)
    state = load_file(tmp_path / "best.safetensors")
    state.pop("3.weight")
    save_file(state, tmp_path / "best.safetensors")
    with pytest.raises(RuntimeError, match=r"lacks 3\.weight"):
        checkpoints.restore_best(model)
