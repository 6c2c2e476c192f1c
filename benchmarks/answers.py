"""Whole responses of encoder-decoder models, timed end to end: every line of a file, with beams, model by model.

MODEL is a directory that this project exported (run by its runtime), one that optimum exported
(``ORTModelForSeq2SeqLM``), or a torch model (``generate`` of transformers). Each batch of lines goes
through every model in turn, so a busy moment of the machine affects all of them. A ratio to the first MODEL is taken
per batch, and the median is reported. Tokenizing is not timed. Run on an idle machine.

Run: python benchmarks/answers.py MODEL MODEL... --lines FILE [--beams 5] [--batch 1] [--out JSON]
"""

import argparse
import gzip
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from comparing import Parser, at_least_two, conclude, whole, writable

from compress.artifact import MANIFEST, adopt
from compress.errors import CompressError, UserError
from compress.measure.workload import REST
from compress.models.loading import load_tokenizer
from compress.onnx.names import ENCODER_FILE
from compress.onnx.runtime import Runtime

Ids = np.ndarray[Any, np.dtype[np.int64]]
Answer = Callable[[Ids, Ids], Sequence[Sequence[int]]]
"""Tokens [B, T] and attention mask [B, T] of sources -> the tokens of each answer."""


def parse() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL")
    parser.add_argument("--lines", type=Path, required=True, help="a text file with one source per line, plain or .gz")
    parser.add_argument("--rows", type=at_least_two, default=100, help="lines at the start of the file")
    parser.add_argument("--beams", type=whole(1), default=5)
    parser.add_argument("--batch", type=whole(1), default=1)
    parser.add_argument("--max-new-tokens", type=whole(1), default=96)
    parser.add_argument("--threads", type=whole(1), default=2)
    parser.add_argument("--out", type=writable, help="file for the JSON, which is also printed")
    return parser.parse_args()


def opened(model: Path, options: argparse.Namespace) -> tuple[str, Answer]:
    """The runtime that opens a directory, and its generation function."""
    settings = {"num_beams": options.beams, "max_new_tokens": options.max_new_tokens}
    if (model / ENCODER_FILE).exists() and (model / MANIFEST).exists():
        return "compress.onnx.runtime", partial(_ours, Runtime.open(model, options.threads), settings)
    if (model / ENCODER_FILE).exists():
        import onnxruntime as ort
        from optimum.onnxruntime import ORTModelForSeq2SeqLM

        session = ort.SessionOptions()
        session.intra_op_num_threads = options.threads
        session.log_severity_level = 3
        found = ORTModelForSeq2SeqLM.from_pretrained(model, session_options=session, local_files_only=True)
        return "optimum", partial(_theirs, found, settings)
    return "transformers", partial(_theirs, adopt(model).model(), settings)


def _ours(runtime: Runtime, settings: dict[str, Any], ids: Ids, mask: Ids) -> Sequence[Sequence[int]]:
    return list(runtime.generate(ids, mask, **settings))


def _theirs(model: Any, settings: dict[str, Any], ids: Ids, mask: Ids) -> Sequence[Sequence[int]]:
    with torch.inference_mode():
        found = model.generate(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask), **settings)
    return list(found.numpy())


def batches(options: argparse.Namespace) -> list[tuple[Ids, Ids]]:
    """The lines as the first model's tokenizer reads them, in the file's order."""
    reader = gzip.open if options.lines.suffix == ".gz" else open
    try:
        with reader(options.lines, "rt", encoding="utf-8") as file:
            lines = [line.rstrip("\n") for _, line in zip(range(options.rows), file, strict=False)]
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"--lines: cannot read {options.lines} ({error})") from None
    if not lines:
        raise UserError(f"--lines: {options.lines} is empty")
    tokenizer: Any = load_tokenizer(options.models[0])
    if tokenizer is None:
        raise UserError(f"{options.models[0]} has no tokenizer")
    groups = [lines[at : at + options.batch] for at in range(0, len(lines), options.batch)]
    coded = [tokenizer(group, padding=True, return_tensors="np") for group in groups]
    return [(each["input_ids"].astype(np.int64), each["attention_mask"].astype(np.int64)) for each in coded]


def timed(answers: dict[str, Answer], work: list[tuple[Ids, Ids]]) -> tuple[list[dict[str, float]], dict[str, int]]:
    """Seconds of each model for each batch, after one batch that is not counted; and the tokens each generated."""
    rounds, tokens = [], dict.fromkeys(answers, 0)
    for count, (ids, mask) in enumerate([work[0], *work]):
        seconds = {}
        for name, answer in answers.items():
            time.sleep(REST)
            start = time.perf_counter()
            found = answer(ids, mask)
            seconds[name] = time.perf_counter() - start
            if count:
                tokens[name] += sum(map(len, found))
        if count:
            rounds.append(seconds)
    return rounds, tokens


def main() -> int:
    options = parse()
    torch.set_num_threads(options.threads)
    names = [model.resolve().name for model in options.models]
    if len(set(names)) < len(names):
        raise UserError(f"directories have the same name: {', '.join(names)}")
    found = {name: opened(model, options) for name, model in zip(names, options.models, strict=True)}
    work = batches(options)
    rounds, tokens = timed({name: answer for name, (_, answer) in found.items()}, work)
    first = names[0]
    rows = sum(len(ids) for ids, _ in work)
    results = {
        name: {
            "answered_by": found[name][0],
            "s_per_row": sum(each[name] for each in rounds) / rows,
            "tokens": tokens[name],
            "times_as_fast": statistics.median(each[first] / each[name] for each in rounds),
            "times_as_fast_in_all": sum(each[first] for each in rounds) / sum(each[name] for each in rounds),
        }
        for name in names
    }
    kept = ("rows", "beams", "batch", "max_new_tokens", "threads")
    conditions = {name: getattr(options, name) for name in kept} | {"rows": rows, "against": first, "rest_s": REST}
    return conclude(conditions, {}, extra={"models": results}, out=options.out)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except CompressError as error:
        sys.exit(str(error))
