"""The message of a failure in one line, and its exit code."""

from __future__ import annotations

import errno
import re

from compress.errors import CompressError, UserError

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT}
_WRONG_PATH = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG
}  # fmt: skip
_NO_MEMORY = re.compile(r"out of memory|can't allocate memory", re.IGNORECASE)


def explained(error: Exception) -> tuple[str, int] | None:
    """Return the text and exit code of an expected failure, or None for a bug, which needs a traceback."""
    number = _number(error)
    if isinstance(error, CompressError):
        return str(error), error.exit_code
    if number in _DISK_FULL:
        return "no space left on the disk; finished results are kept, and the same command continues", 1
    if number in _WRONG_PATH:
        return _of_path(error), UserError.exit_code
    if isinstance(error, MemoryError) or _NO_MEMORY.search(str(error)):
        return (
            "out of memory; finished results are kept, and a smaller batch (with more accumulate) needs less memory",
            1,
        )
    return None


def _number(error: Exception) -> int | None:
    """Return the system's error number. Libraries written in Rust give it only in their messages."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def _of_path(error: Exception) -> str:
    if not isinstance(error, OSError):
        return str(error)
    return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)
