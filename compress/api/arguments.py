"""Checks of arguments that several functions take. Each error names the argument, its value and what is allowed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pydantic
import torch

from compress.artifact import Artifact, adopt, adopt_deployed
from compress.errors import CompressError, UserError, located
from compress.problem import Location, Problem
from compress.schema import Strict, fault

SEEDS = 2**32
"""Seeds are below this number, as in recipes."""


def configured(kind: type[Strict], **values: Any) -> Any:
    """Build a config. The first thing that is wrong with it becomes a UserError whose path starts at the argument."""
    try:
        return kind(**values)
    except pydantic.ValidationError as error:
        found = error.errors()
        first = next((each for each in found if not each["type"].endswith("_type")), found[0])
        path = tuple(part for part in first["loc"] if str(part).isidentifier())
        given = "" if isinstance(first["input"], Mapping) or not path else f" (given: {first['input']!r})"
        raise UserError(Problem(path, fault(first) + given)) from None


@contextmanager
def renamed(argument: Callable[[Location], Location]) -> Iterator[None]:
    """Name arguments in errors. ``argument`` maps the path of a field to the path of the argument that sets it."""
    try:
        yield
    except CompressError as error:
        error.problem = Problem(argument(error.problem.path), error.problem.text)
        raise


def refuse_idle(given: Iterable[str], idle: Mapping[str, str]) -> None:
    """Raise UserError for the first of the given arguments that would change nothing; ``idle`` says why."""
    if name := next((name for name in given if name in idle), None):
        raise UserError(f"{name}: would change nothing, {idle[name]}; leave it out")


def require_choice(value: Any, name: str, allowed: Iterable[str]) -> None:
    """Raise UserError for a value that is none of the allowed names."""
    allowed = list(allowed)
    if not isinstance(value, str) or value not in allowed:
        raise UserError(f"{name}: {value!r} is not known; allowed: {', '.join(allowed)}")


def require_flag(value: Any, name: str) -> None:
    """Raise UserError for anything but True and False."""
    if not isinstance(value, bool):
        raise UserError(f"{name}: expected True or False, got {value!r}")


def require_seed(seed: Any) -> None:
    """Raise UserError for a seed that is not a whole number from 0, or that is too large for a generator."""
    if type(seed) is not int or not 0 <= seed < SEEDS:
        raise UserError(f"seed: expected a whole number from 0, below 2**32, got {seed!r}")


def require_path(path: Any, name: str) -> Path:
    """Return the path. Raise UserError unless it is text or a path with a last part."""
    if not isinstance(path, str | os.PathLike) or not Path(path).name or "\0" in str(path):
        raise UserError(f"{name}: expected a path such as 'runs/small', got {path!r}")
    return Path(path)


def require_device(device: Any) -> str:
    """Return the name of a device that torch can use on this machine. Raise UserError for any other."""
    if isinstance(device, str | torch.device):
        try:
            if (found := torch.empty(0, device=device).device).type != "meta":
                return str(found)
        except (RuntimeError, AssertionError, NotImplementedError):
            pass  # torch raises one of them for a device that this machine lacks; the error below names it
    there = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    raise UserError(f"device: {str(device)!r} cannot hold a model here; allowed: {', '.join(there)}")


def opened(path: Any, name: str, *, deployed: bool = False) -> Artifact:
    """Return the artifact in a directory; ``deployed`` accepts ONNX files of other tools.

    Raises:
        UserError: ``path`` is not a path.
        ModelError: no model can be opened there. The message starts with ``name``.
    """
    if not isinstance(path, str | os.PathLike) or not str(path):
        raise UserError(f"{name}: expected the path of a model directory, got {path!r}")
    with located(name):
        return adopt_deployed(Path(path)) if deployed else adopt(_plain(path))


def _plain(path: str | os.PathLike[str]) -> str | Path:
    """Return text unchanged, because it may be the id of a hub model, and anything else as a path."""
    return path if isinstance(path, str) else Path(path)
