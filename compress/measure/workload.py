"""The workload of a speed measurement, and the timing of one pass. Needs neither torch nor transformers.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from compress.onnx.runtime import Runtime
from compress.onnx.runtime.seq2seq_session import Seq2SeqDecoding
from compress.onnx.runtime.session import Array, Decoding

REST = 0.1
"""Seconds of pause before each pass. The threads of the previous runtime keep looking for work for about 50 ms. Without
the pause they take processor time from the next pass, which doubled the time of a prompt."""


@dataclass(frozen=True)
class Workload:
    """Feed ``prompt`` tokens per row, then choose and feed ``new_tokens`` tokens one by one, greedily."""

    prompt: int
    new_tokens: int
    batch: int
    threads: int
    vocabulary: int

    def ids(self) -> Array:
        """Return the same random prompts [B, T] for every model."""
        return np.random.default_rng(0).integers(0, self.vocabulary, (self.batch, self.prompt))


class Stepper(Protocol):
    """A model that decodes greedily, one call at a time."""

    runtime: str

    def prefill(self, ids: Any, new_tokens: int) -> None:
        """Discard earlier state, read prompts [B, T], and choose the first new token."""
        ...

    def step(self) -> None:
        """Feed the last chosen token, and choose the next one."""
        ...


@dataclass(frozen=True)
class Times:
    """Seconds of one pass: for the prompt, and for each further token."""

    prefill: float
    steps: tuple[float, ...]


def timed_pass(stepper: Stepper, work: Workload) -> Times:
    """Decode once and return the time of each part."""
    ids = work.ids()
    start = time.perf_counter()
    stepper.prefill(ids, work.new_tokens)
    marks = [time.perf_counter()]
    for _ in range(work.new_tokens):
        stepper.step()
        marks.append(time.perf_counter())
    return Times(marks[0] - start, tuple(np.diff(marks).tolist()))


class OnnxStepper:
    """An exported artifact in onnxruntime on the CPU."""

    runtime = "onnxruntime"

    def __init__(self, directory: Path, threads: int) -> None:
        self._runtime = Runtime.open(directory, threads=threads)
        self._decoding: Decoding | Seq2SeqDecoding
        self._tokens: Array

    def prefill(self, ids: Any, new_tokens: int) -> None:
        self._decoding, logits = self._runtime.begin(ids, longest=ids.shape[1] + new_tokens)
        self._choose(logits)

    def step(self) -> None:
        self._choose(self._decoding.feed(self._tokens)[:, -1])

    def _choose(self, logits: Array) -> None:
        self._tokens = logits.argmax(-1)[:, None]
