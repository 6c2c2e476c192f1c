"""Files and directories that are complete or absent, even after a power loss."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

PARTIAL = ".partial"
"""The suffix of files and directories that are not complete yet."""

_CANNOT_SYNC = {errno.EINVAL, errno.ENOTSUP}


def publish(partial: Path, final: Path, *, replace: bool = False) -> None:
    """Flush a file or directory to disk, and then rename it to ``final``.

    A rename alone is not enough. After a power loss the new name may exist while the content is missing. A file or an
    empty directory with that name is replaced. A directory with content is deleted only with ``replace``; otherwise
    OSError is raised, so that a wrong path never costs a user's files.
    """
    for path in (*partial.rglob("*"), partial):
        _sync(path)
    if replace and final.is_dir():
        shutil.rmtree(final)
    os.replace(partial, final)
    _sync(final.parent)


def write_text(path: Path, text: str) -> None:
    """Write a complete file, or none if writing is interrupted."""
    partial = path.with_name(path.name + PARTIAL)
    partial.write_text(text, encoding="utf-8")
    publish(partial, path)


def sha256(path: Path) -> str:
    """Return the hash of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def changed(directory: Path, hashes: Mapping[str, str]) -> str | None:
    """Return the problem with the first file that is missing or whose hash differs from ``hashes``, or None."""
    for name, digest in hashes.items():
        if not (directory / name).exists():
            return f"{name} is missing; the artifact is incomplete"
        if sha256(directory / name) != digest:
            return f"{name} has changed since the artifact was saved"
    return None


def require_whole(file: Path) -> None:
    """Raise ValueError, with the reason on one line, if a safetensors file is missing or incomplete."""
    try:
        with safe_open(file, framework="np"):
            """Opening compares the length of the file with its header."""
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
