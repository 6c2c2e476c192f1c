"""Files and directories that are whole or absent, also after the power was lost."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

PARTIAL = ".partial"
"""Ends the name of what is not whole yet."""

_CANNOT_SYNC = {errno.EINVAL, errno.ENOTSUP}


def publish(partial: Path, final: Path) -> None:
    """Put all of a file or directory on the disk, and only then give it its final name, replacing what has that name.

    A rename alone does not do: after a loss of power it may be there while the content is not.
    """
    for path in (*partial.rglob("*"), partial):
        _sync(path)
    if final.is_dir():
        shutil.rmtree(final)
    os.replace(partial, final)
    _sync(final.parent)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(path.name + PARTIAL)
    partial.write_text(text, encoding="utf-8")
    publish(partial, path)


def sha256(path: Path) -> str:
    """The hash of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def changed(directory: Path, hashes: Mapping[str, str]) -> str | None:
    """What is wrong with the first file, by name and hash, that is missing or another than it was; None where none."""
    for name, digest in hashes.items():
        if not (directory / name).exists():
            return f"{name} is missing; the artifact is not whole"
        if sha256(directory / name) != digest:
            return f"{name} is not the file that was sealed"
    return None


def require_whole(file: Path) -> None:
    """Raise ValueError, with the reason in one line, for a safetensors file that is missing or not whole."""
    try:
        with safe_open(file, framework="np"):
            """Opening compares the length with what the header says."""
    except (OSError, SafetensorError) as error:
        raise ValueError(" ".join(str(error).split())) from None


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if not path.is_dir() or error.errno not in _CANNOT_SYNC:  # some network file systems cannot sync a directory
            raise
    finally:
        os.close(handle)
