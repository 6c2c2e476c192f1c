"""Metrics of generated text as ``evaluate`` modules that ship with the package, so that none is fetched from a hub.

Scores are between 0 and 100, but for the words that ``length`` counts and their ratio. Each module names what it
computed with in ``signature``.
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
    """Return the scores of a metric; each prediction is compared with one reference or several.

    Args:
        name: one of ``NAMES``.
        predictions: the texts.
        references: what each is compared with, any number of texts for each.
        options: what a metric takes besides: ``sentences`` of ``rouge``, ``tokenize`` of ``bleu``, ``full`` of
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
    """A directory for what ``evaluate`` copies and imports, gone when the process ends.

    Left alone where a module was loaded before: Python already imports ``evaluate_modules`` from elsewhere.
    """
    directory = tempfile.mkdtemp(prefix="compress-metrics-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    if "evaluate_modules" not in sys.modules:
        evaluate.config.HF_MODULES_CACHE = directory
    return directory
