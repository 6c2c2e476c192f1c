"""The answers of a model to many prompts: with a progress bar, and continued where they were interrupted."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

from compress.files import write_text
from compress.generation.settings import Generation, seed_of
from compress.generation.subject import TorchSubject
from compress.training.interrupt import Interrupt
from compress.training.progress import RowMeter


def answers(
    subject: TorchSubject,
    prompts: Sequence[list[int]],
    decoding: Generation,
    batch: int,
    directory: Path,
    *,
    name: str,
    seed: int,
    bar: bool = True,
) -> list[list[int]]:
    """Answer every prompt, up to and with the end token where an answer comes to one.

    Prompts of like length are answered together, the longest first, so that a lack of memory shows at once. What is
    done lies in ``directory`` batch by batch; each batch has a seed of its own, so that interrupted and continued gives
    what a straight run gives.
    """
    order = sorted(range(len(prompts)), key=lambda at: -len(prompts[at]))
    batches = [order[at : at + batch] for at in range(0, len(order), batch)]
    journal = directory / "answers.jsonl"
    done = _whole(journal)
    directory.mkdir(parents=True, exist_ok=True)
    write_text(journal, "".join(map(_line, done)))
    ready = sum(map(len, done))
    with (
        Interrupt() as interrupt,
        RowMeter(name, len(order), ready, shown=bar) as meter,
        journal.open("a") as file,
    ):
        for number in range(len(done), len(batches)):
            began = time.perf_counter()
            chosen = [prompts[at] for at in batches[number]]
            done.append(subject.complete(chosen, decoding, seed_of(seed, number)))
            file.write(_line(done[-1]))
            file.flush()
            rate = sum(map(len, done[-1])) / (time.perf_counter() - began)
            meter.advance(len(chosen), f"{rate:,.0f} tok/s")
            if interrupt.asked and number + 1 < len(batches):
                raise KeyboardInterrupt
    found: list[list[int]] = [[] for _ in prompts]
    for rows, texts in zip(batches, done, strict=True):
        for at, answer in zip(rows, texts, strict=True):
            found[at] = answer
    return found


def _line(answers: list[list[int]]) -> str:
    return json.dumps(answers) + "\n"


def _whole(journal: Path) -> list[list[list[int]]]:
    """The batches before the first line that is not whole: a kill leaves half of one, a loss of power garbage."""
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
