"""What a launcher leaves in the environment tells a process who it is."""

from __future__ import annotations

import pytest

from compress.distributed import processes


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*processes._COUNT, *processes._RANK, *processes._LOCAL, "ACCELERATE_USE_CPU", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)


def test_without_a_launcher_there_is_one_process() -> None:
    assert (processes.count(), processes.rank(), processes.local_rank(), processes.is_main()) == (1, 0, 0, True)
    assert not processes.alone_by_mistake()


@pytest.mark.parametrize(
    "names",
    [
        ("WORLD_SIZE", "RANK", "LOCAL_RANK"),
        ("PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID"),
        ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ],
)
def test_launchers_are_understood(names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(names, ("4", "3", "1"), strict=True):
        monkeypatch.setenv(name, value)
    assert (processes.count(), processes.rank(), processes.local_rank()) == (4, 3, 1)
    assert not processes.is_main()


def test_a_rank_without_others_is_the_main_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert processes.is_main()


@pytest.mark.parametrize("size", [2, 3, 7, 8])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_shares_cover_everything_once_and_evenly(size: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(count))
    shares = []
    for rank in range(count):
        monkeypatch.setenv("RANK", str(rank))
        shares.append(range(size)[processes.share(size)])
    assert [each for share in shares for each in share] == list(range(size))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_one_process_where_several_were_asked_for_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    assert processes.on_cpu() and not processes.alone_by_mistake()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert processes.alone_by_mistake()
    monkeypatch.setenv("PMI_SIZE", "2")
    assert not processes.alone_by_mistake()
