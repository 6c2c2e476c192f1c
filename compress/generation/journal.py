"""The responses of a model to many prompts, with a progress bar. An interrupted run continues where it stopped."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

from compress.files import write_text
from compress.generation.responses import responses
from compress.generation.seeds import seed_of
from compress.generation.settings import Generation
from compress.generation.subject import TorchSubject
from compress.training.interrupt import Interrupt
from compress.training.progress import RowMeter


def journaled(
    subject: TorchSubject,
    prompts: Sequence[list[int]],
    decoding: Generation,
    batch_size: int,
    directory: Path,
    *,
    name: str,
    seed: int,
    bar: bool = True,
) -> list[list[int]]:
    """Return the response to every prompt. It includes the end token where the model wrote one.

    Each finished batch is appended to ``directory/responses.jsonl``. Each batch has its own seed, so an interrupted and
    continued run gives the same responses as an uninterrupted one. Raises KeyboardInterrupt after the current batch
    if the user asks to stop.
    """
    journal = directory / "responses.jsonl"
    done = _whole(journal)
    directory.mkdir(parents=True, exist_ok=True)
    write_text(journal, "".join(map(_line, done)))
    ready = sum(map(len, done))
    with (
        Interrupt() as interrupt,
        RowMeter(name, len(prompts), ready, shown=bar) as meter,
        journal.open("a") as file,
    ):
        written, began = ready, 0.0

        def generate(chosen: Sequence[list[int]], number: int) -> list[list[int]]:
            nonlocal began
            began = time.perf_counter()
            return subject.complete(chosen, decoding, seed_of(seed, number))

        def finished(batch: list[list[int]]) -> None:
            nonlocal written
            file.write(_line(batch))
            file.flush()
            written += len(batch)
            rate = sum(map(len, batch)) / (time.perf_counter() - began)
            meter.advance(len(batch), f"{rate:,.0f} tok/s")
            if interrupt.asked and written < len(prompts):
                raise KeyboardInterrupt

        return responses(prompts, batch_size, generate, longest_first=True, done=done, finished=finished)


def _line(batch: list[list[int]]) -> str:
    return json.dumps(batch) + "\n"


def _whole(journal: Path) -> list[list[list[int]]]:
    """Return the batches before the first damaged line, which a killed process or a power loss may leave."""
    found: list[list[list[int]]] = []
    lines = journal.read_text(errors="replace").splitlines(keepends=True) if journal.exists() else []
    for line in lines:
        try:
            batch = json.loads(line) if line.endswith("\n") else None
        except ValueError:
            batch = None
        if not isinstance(batch, list):
            break
        found.append(batch)
    return found
