"""Metrics of generated text as ``evaluate`` modules that ship with the package. None is downloaded from a hub.

Scores are between 0 and 100, except the word counts of ``length`` and their ratio. Each module reports the settings it
used as ``signature``.
"""

from __future__ import annotations

import atexit
import shutil
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import evaluate

NAMES = ("rouge", "bleu", "chrf", "exact_match", "length", "distinct")


def score(name: str, predictions: Sequence[str], references: Sequence[Sequence[str]], **options: Any) -> dict[str, Any]:
    """Return the scores of a metric. Each prediction is compared with one or several references.

    Args:
        name: one of ``NAMES``.
        predictions: the texts to score.
        references: the reference texts of each prediction. Their number may differ between predictions.
        options: further arguments of a metric: ``sentences`` of ``rouge``, ``tokenize`` of ``bleu``, ``full`` of
            ``length``.
    """
    module = _load(name)
    rows = [list(row) for row in references]
    scores: dict[str, Any] = module.compute(predictions=list(predictions), references=rows, **options)
    return scores


@cache
def _load(name: str) -> Any:
    script = Path(__file__).with_name(f"{name}.py")
    return evaluate.load(str(script), keep_in_memory=True, cache_dir=_cache())


@cache
def _cache() -> str:
    """A directory for the modules that ``evaluate`` copies and imports. It is removed when the process ends.

    The setting does not change if a module was loaded before, because Python then imports ``evaluate_modules`` from
    another directory already.
    """
    directory = tempfile.mkdtemp(prefix="compress-metrics-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    if "evaluate_modules" not in sys.modules:
        evaluate.config.HF_MODULES_CACHE = directory
    return directory
