"""What the comparisons share: steps timed in turn, ratios within a round, figures compared with their bounds."""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch

Step = Callable[[], None]
Rounds = list[dict[str, float]]
"""Seconds of one step of each kind, a round each."""


class Parser(argparse.ArgumentParser):
    """Options whose mistakes are reported in one line, with exit code 2."""

    def __init__(self, text: str | None) -> None:
        super().__init__(description=text, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message.removeprefix('argument ')}\n")


def whole(least: int) -> Callable[[str], int]:
    """The type of an option that is a whole number of at least ``least``."""

    def parsed(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return int(text)

    return parsed


at_least_two = whole(2)
"""A number of rounds, of which there must be two for quartiles."""


def writable(text: str) -> Path:
    """A file that can be written: its directory exists."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text} is not a file in an existing, writable directory")
    return path


def creatable(text: str) -> Path:
    """A directory that exists or can be made, and is writable."""
    path = Path(text)
    there = next(each for each in (path, *path.absolute().parents) if each.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text} is not a directory that can be made or written to ({there})")
    return path


def check_positions(parser: argparse.ArgumentParser, options: argparse.Namespace, *asked: tuple[str, int]) -> None:
    """Refuse options (name and tokens) that ask for more than ``--positions``."""
    for name, tokens in asked:
        if tokens > options.positions:
            parser.error(f"{name}: {tokens} tokens exceed --positions {options.positions}")


def timed(steps: Mapping[str, Step], rounds: int, device: str = "cpu") -> Rounds:
    """Take one step of each kind in turn, ``rounds`` times, after one warm-up step of each."""
    for step in steps.values():
        seconds(step, device)
    return [{name: seconds(step, device) for name, step in steps.items()} for _ in range(rounds)]


def seconds(step: Step, device: str) -> float:
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def medians(rounds: Rounds) -> dict[str, float]:
    """The median step of each kind in ms."""
    return {name: 1e3 * statistics.median(each[name] for each in rounds) for name in rounds[0]}


def percentiles(seconds: Iterable[float]) -> dict[str, float]:
    """Median and 95th percentile in ms."""
    found = sorted(seconds)
    cuts = statistics.quantiles(found, n=20, method="inclusive") if len(found) > 1 else found * 19
    return {"p50": 1e3 * statistics.median(found), "p95": 1e3 * cuts[18]}


def ratio(rounds: Rounds, name: str, plain: str, bound: float) -> dict[str, float | bool]:
    """How many times as long ``name`` takes as ``plain``: the median over rounds, with the quartiles."""
    low, median, high = statistics.quantiles((each[name] / each[plain] for each in rounds), n=4)
    return {**at_most(median, bound), "quartile_1": low, "quartile_3": high}


def at_most(value: float, bound: float) -> dict[str, float | bool]:
    """A figure with its upper bound."""
    return {"value": value, "bound": bound, "within": value <= bound}


def speedup(rounds: Rounds, name: str, plain: str, bound: float) -> dict[str, float | bool]:
    """How many times as fast ``name`` is as ``plain``: the median over rounds, with the quartiles."""
    low, median, high = statistics.quantiles((each[plain] / each[name] for each in rounds), n=4)
    return {**at_least(median, bound), "quartile_1": low, "quartile_3": high}


def at_least(value: float, bound: float) -> dict[str, float | bool]:
    """A figure with its lower bound."""
    return {"value": value, "bound": bound, "within": value >= bound}


def conclude(
    conditions: dict[str, Any],
    step_ms: dict[str, float],
    *,
    extra: Mapping[str, Any] | None = None,
    out: Path | None = None,
    **figures: dict[str, dict[str, Any]],
) -> int:
    """Print the result as JSON. Returns 1, with a line on stderr for each figure beyond its bound, else 0.

    ``extra`` is printed after the figures and has no bound; ``out`` is a file that also gets the JSON.
    """
    result = json.dumps({"conditions": conditions, "step_ms": step_ms, **figures, **(extra or {})}, indent=2)
    print(result)
    if out is not None:
        out.write_text(result + "\n", encoding="utf-8")
    beyond = [
        f"{kind}.{name}: {figure['value']:.3f} is beyond the bound of {figure['bound']}"
        for kind, named in figures.items()
        for name, figure in named.items()
        if not figure["within"]
    ]
    for line in beyond:
        print(line, file=sys.stderr)
    return int(bool(beyond))
