"""Publishing a directory never deletes files that a user did not ask to delete."""

from __future__ import annotations

from pathlib import Path

import pytest

from compress.engine.exporting import new_directory
from compress.errors import UserError
from compress.files import publish


def test_a_directory_with_content_is_replaced_only_on_request(tmp_path: Path) -> None:
    partial, final = tmp_path / "new.partial", tmp_path / "new"
    for place in (partial, final):
        place.mkdir()
        (place / place.name).write_text("kept")
    with pytest.raises(OSError, match="not empty"):
        publish(partial, final)
    assert (final / "new").read_text() == "kept" and (partial / "new.partial").exists()
    publish(partial, final, replace=True)
    assert [path.name for path in final.iterdir()] == ["new.partial"] and not partial.exists()


def test_an_empty_directory_is_replaced(tmp_path: Path) -> None:
    partial, final = tmp_path / "new.partial", tmp_path / "new"
    partial.mkdir()
    final.mkdir()
    (partial / "file").write_text("kept")
    publish(partial, final)
    assert (final / "file").read_text() == "kept"


@pytest.mark.parametrize("path", ["missing/..", "missing/../..", "missing/../../home", ".", ".."])
def test_a_path_through_a_missing_directory_is_the_directory_it_leads_to(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("years of work")
    monkeypatch.chdir(home)
    with pytest.raises(UserError, match="exists already; give a new directory"), new_directory(path):
        raise AssertionError("the block must not run")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["home", "thesis.tex"]


def test_a_directory_of_the_user_with_the_name_of_a_partial_one_is_kept(tmp_path: Path) -> None:
    (tmp_path / "small.partial").mkdir()
    (tmp_path / "small.partial/thesis.tex").write_text("years of work")
    with new_directory(tmp_path / "small") as (first, final), new_directory(tmp_path / "small") as (second, _):
        assert first != second and final == tmp_path / "small"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["small.partial", "thesis.tex"]
