"""What has its final name is whole, and was on the disk before it had it."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from compress.files import publish, require_whole, sha256, write_text


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths that were synced, with ``renamed`` where one got its name."""
    found: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(handle: int) -> None:
        found.append(os.readlink(f"/proc/self/fd/{handle}"))
        fsync(handle)

    def renamed(source: Any, target: Any) -> None:
        found.append("renamed")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    return found


def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, events: list[str]) -> None:
    partial, final = tmp_path / "made.partial", tmp_path / "made"
    (partial / "deep").mkdir(parents=True)
    (partial / "one").write_text("1")
    (partial / "deep" / "two").write_text("2")
    publish(partial, final)
    at = events.index("renamed")
    assert sorted(events[:at]) == [str(partial), *(f"{partial}/{name}" for name in ("deep", "deep/two", "one"))]
    assert events[at + 1 :] == [str(tmp_path)]  # and the name itself is on the disk afterwards
    assert (final / "deep" / "two").read_text() == "2" and not partial.exists()


def test_text_that_cannot_be_written_leaves_the_old_text(
    tmp_path: Path, events: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.json"
    write_text(path, "old")
    assert events == [f"{path}.partial", "renamed", str(tmp_path)]

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_text(path, "new")
    assert path.read_text() == "old"


def test_a_file_system_that_cannot_sync_directories_still_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(handle: int) -> None:
        if Path(f"/proc/self/fd/{handle}").is_dir():
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "fsync", refuse)
    write_text(tmp_path / "note", "text")
    assert (tmp_path / "note").read_text() == "text"


def test_a_hash_is_that_of_the_content(tmp_path: Path) -> None:
    write_text(tmp_path / "empty", "")
    assert sha256(tmp_path / "empty") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_tensors_are_whole_or_reported(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    with pytest.raises(ValueError, match="No such file"):
        require_whole(file)
    save_file({"a": np.ones(100, np.float32)}, file)
    require_whole(file)
    content = file.read_bytes()
    for torn in (b"", content[:20], content[:-1], content + b"x"):
        file.write_bytes(torn)
        with pytest.raises(ValueError, match=r"^[^\n]+$"):
            require_whole(file)
