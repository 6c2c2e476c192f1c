"""What processes do together, and that none waits for one that has ended."""

from __future__ import annotations

import json
import time

import pytest
import torch

from compress.distributed import collectives, processes
from compress.errors import UserError
from tests.launching import launch

TOGETHER = """
import json, time, torch
from compress.distributed import collectives
from compress.distributed import processes
collectives.join("cpu")
rank = processes.rank()
rows = torch.arange(2 * (3 * rank + 1), dtype=torch.float32).view(-1, 2) + 10 * rank
apart = torch.arange(6.0).view(2, 3).t()[rank:]
with collectives.main_first():
    times = [time.monotonic()]
    time.sleep(0 if rank else 1)
    times.append(time.monotonic())
print(json.dumps({
    "mean": collectives.mean(torch.tensor([1.0, 4.0]) * (rank + 1)).tolist(),
    "means": collectives.means([1, 4.0 * rank]),
    "anywhere": [collectives.anywhere(rank == 2), collectives.anywhere(rank == 3)],
    "gathered": collectives.gathered(rows).tolist(),
    "empty": collectives.gathered(torch.zeros(3 * rank, dtype=torch.uint8)).tolist(),
    "strided": collectives.gathered(apart).tolist(),
    "reported": collectives.from_main(f"said by {rank}: \\u00fc" * (rank + 1)),
    "times": times,
}))
collectives.leave()
"""
ENDING = """
import os, sys, torch
from compress.distributed import collectives
from compress.distributed import processes
from compress.errors import LostError
collectives.join("cpu")
collectives.wait()
if processes.rank() == int(sys.argv[1]):
    os._exit(7)  # as one that was killed: the libraries have no chance to say good-bye
try:
    with collectives.main_first():
        collectives.mean(torch.ones(2))
except LostError as error:
    sys.exit(f"lost: {error}")
"""


def test_alone_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*processes._COUNT, *processes._RANK):
        monkeypatch.delenv(name, raising=False)
    collectives.join("cpu")
    assert not torch.distributed.is_initialized()
    tensor = torch.ones(2)
    assert collectives.mean(tensor) is tensor and collectives.gathered(tensor) is tensor
    assert collectives.means([1, 2.5]) == [1.0, 2.5]
    assert [collectives.anywhere(flag) for flag in (True, False)] == [True, False]
    assert collectives.from_main("text") == "text"
    with collectives.main_first():
        collectives.wait()


@pytest.mark.parametrize("name", ["FSDP", "DeepSpeed", "Megatron-LM"])
def test_what_splits_a_model_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    variable = f"ACCELERATE_USE_{name.upper().replace('-', '_')}"
    monkeypatch.setenv(variable, "false")
    collectives.join("cpu")
    monkeypatch.setenv(variable, "true")
    with pytest.raises(UserError, match=f"^accelerate launch: {name} splits a model, .*; use --multi_gpu$"):
        collectives.join("cpu")


def test_more_processes_than_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "1"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="no CUDA device of its own; allowed: --num_processes up to 1, or --device cpu"):
        collectives.join("cuda")


@pytest.mark.slow
def test_three_processes_agree() -> None:
    done = launch(3, "-W", "error", "-c", TOGETHER)
    assert [each.returncode for each in done] == [0, 0, 0], [each.stderr for each in done]
    found = [json.loads(each.stdout) for each in done]
    times = [each.pop("times") for each in found]
    assert found[0] == found[1] == found[2]
    expected = [row for rank in range(3) for row in (torch.arange(6 * rank + 2).view(-1, 2) + 10 * rank).tolist()]
    columns = [[0, 3], [1, 4], [2, 5]]
    assert found[0] == {
        "mean": [2.0, 8.0],
        "means": [1.0, 4.0],
        "anywhere": [True, False],
        "gathered": expected,
        "empty": [0] * 9,
        "strided": columns + columns[1:] + columns[2:],
        "reported": "said by 0: ü",
    }
    assert all(begun >= times[0][1] for begun, _ in times[1:])


@pytest.mark.slow
@pytest.mark.parametrize("ending", [0, 1])
def test_who_waits_for_one_that_ended_ends(ending: int) -> None:
    began = time.monotonic()
    done = launch(2, "-c", ENDING, ending)
    assert done[ending].returncode == 7
    assert done[1 - ending].returncode == 1
    assert done[1 - ending].stderr.strip().endswith("another process of this run has ended; see its error message")
    assert time.monotonic() - began < 300


@pytest.mark.slow
def test_a_process_disconnects_before_the_interpreter_shuts_down() -> None:
    code = """
import atexit, torch
atexit.register(lambda: print("connected at exit:", torch.distributed.is_initialized()))
from compress.distributed import collectives
collectives.join("cpu")
collectives.wait()
raise SystemExit(3)
"""
    done = launch(2, "-c", code)
    assert [each.returncode for each in done] == [3, 3], [each.stderr for each in done]
    assert [each.stdout for each in done] == ["connected at exit: False\n"] * 2


@pytest.mark.slow
def test_processes_that_cannot_meet_are_reported() -> None:
    code = "from compress.distributed import collectives; collectives.join('cpu')"
    done = launch(1, "-c", f"import os; os.environ['WORLD_SIZE'] = '2'; del os.environ['MASTER_ADDR']\n{code}")
    assert "UserError: the processes of this run cannot reach each other" in done[0].stderr
