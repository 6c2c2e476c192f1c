"""Two processes take the steps that one takes, stop together, and continue where they were."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.launching import launch
from tests.sharing import STEPS, WAYS, trained, write_rows

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left."""
    directory = tmp_path_factory.mktemp("shared")
    write_rows(directory)
    for done in launch(2, "-W", "error", "-m", "tests.sharing", directory):
        assert done.returncode == 0, done.stderr
    return directory


def found(directory: Path, name: str, rank: int) -> dict[str, Tensor]:
    return load_file(directory / f"{name}-{rank}" / "found")


def curves(out: Path) -> list[dict[str, float]]:
    """Every number of ``history.jsonl`` but the times."""
    lines = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    flat = [line | line.pop("terms", {}) for line in lines]
    return [{key: value for key, value in line.items() if key != "tokens_per_s"} for line in flat]


@pytest.mark.parametrize("name", WAYS)
def test_two_processes_take_the_steps_of_one(name: str, shared: Path, tmp_path: Path) -> None:
    alone, two = trained(name, shared, tmp_path / "alone"), found(shared, name, 0)
    assert two.keys() == alone.keys()
    for step in range(STEPS):
        keys = [key for key in alone if key.startswith(f"gradient.{step}.")]
        one, other = (torch.cat([each[key].flatten() for key in keys]) for each in (alone, two))
        assert one.norm() > 0
        assert (one - other).norm() < 1e-4 * one.norm(), f"update {step}"
    for key in (key for key in alone if key.startswith("state.")):
        one, other = alone[key], two[key]
        assert (one - other).abs().max() <= 1e-4 * one.abs().max(), key
    for line, expected in zip(curves(shared / f"{name}-0"), curves(tmp_path / "alone"), strict=True):
        assert line == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", [*WAYS, "straight", "resumed"])
def test_every_process_ends_with_the_same_bits(name: str, shared: Path) -> None:
    first, second = found(shared, name, 0), found(shared, name, 1)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert curves(shared / f"{name}-0") == curves(shared / f"{name}-1") or name == "resumed"


def test_all_stop_where_one_is_asked_to_and_resumed_equals_straight(shared: Path) -> None:
    straight, resumed = found(shared, "straight", 0), found(shared, "resumed", 0)
    assert all((shared / f"resumed-{rank}" / "stopped").exists() for rank in (0, 1))
    for key in (key for key in straight if key.startswith("state.")):
        assert torch.equal(straight[key], resumed[key]), key
    assert curves(shared / "straight-0") == curves(shared / "resumed-0")
    assert len([key for key in resumed if key.endswith(".0")]) < len([key for key in straight if key.endswith(".0")])


def test_processes_draw_different_numbers(shared: Path) -> None:
    checkpoint = max((shared / "straight-0" / "checkpoints").glob("step-*"))
    first, second = load_file(checkpoint / "random.safetensors")["cpu"].view(2, -1)
    assert not torch.equal(first, second)


def test_the_main_process_alone_writes_checkpoints(shared: Path) -> None:
    assert (shared / "straight-0" / "checkpoints").is_dir()
    assert not (shared / "straight-1" / "checkpoints").exists()
