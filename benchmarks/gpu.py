"""Whole and cut models on a GPU: torch eager and compiled, onnxruntime's CUDA provider, several batch sizes, as JSON.

Each round every contender decodes the same random prompts greedily, in turn; medians over rounds. The float graph is
torch's (GPT-2) or optimum's (BART); packed graphs are timed where the provider takes their products and attention.
Unavailable runtimes are skipped by name. Without a CUDA device nothing is measured, and one line says so.

Run: python benchmarks/gpu.py [--model gpt2|bart] [--batches 1 8 32] [--keep DIR]
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import ort_provider
import stock_seq2seq
import torch
from comparing import (
    Parser,
    Rounds,
    at_least_two,
    check_positions,
    conclude,
    creatable,
    medians,
    percentiles,
    speedup,
    whole,
)
from contender import Run, Skipped, finished
from goals import CUT_ON_GPU, GOALS
from own_models import BITS, CUTS, Shape, claim, export_own, passes, stock
from stock_graphs import export_float

from compress.artifact import adopt
from compress.errors import CompressError
from compress.measure.torch_stepper import TorchStepper
from compress.measure.workload import Times, Workload
from compress.models.stock_files import copy_settings
from compress.onnx.export.exporter import write_graphs

MODES = ("eager", "compiled", "onnxruntime", "packed")
IN_TORCH = ("eager", "compiled")
"""Modes in which cut models have a goal."""
WHOLE = "whole"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--model", choices=list(GOALS), default="gpt2")
    parser.add_argument("--layers", type=whole(1), default=12, help="on either side, if there are two")
    parser.add_argument("--hidden", type=whole(6), default=768)
    parser.add_argument("--heads", type=whole(1), default=12)
    parser.add_argument("--vocabulary", type=whole(4), default=50257)
    parser.add_argument("--positions", type=whole(1), default=1024)
    parser.add_argument("--prompt", type=whole(1), default=128)
    parser.add_argument("--new-tokens", type=whole(1), default=64)
    parser.add_argument("--batches", type=whole(1), nargs="+", default=[1, 8, 32])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--precision", choices=list(DTYPES), default="float32", help="of torch; graphs are float32")
    parser.add_argument("--rounds", type=at_least_two, default=7)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: to try the script")
    parser.add_argument("--keep", type=creatable, help="directory for the models, which are reused")
    options = parser.parse_args(arguments)
    if options.model == "gpt2":
        check_positions(parser, options, ("--prompt with --new-tokens", options.prompt + options.new_tokens))
    else:
        check_positions(parser, options, ("--prompt", options.prompt), ("--new-tokens", options.new_tokens + 1))
    return options


def runs(options: argparse.Namespace, root: Path, skipped: dict[str, str]) -> dict[str, Run]:
    """Every size in every available mode."""
    found = {}
    for name, twelfths in ((WHOLE, 12), *CUTS.items()):
        directory = stock(Shape.of(options), root, twelfths)
        for mode in options.modes:
            for kind in [f"{mode} {bits}" for bits in BITS] if mode == "packed" else [mode]:
                try:
                    found[f"{name} {kind}"] = opened(directory, kind, options)
                except Skipped as reason:
                    skipped[kind] = str(reason)
    for kind, reason in skipped.items():
        print(f"skipped: {kind} ({reason})", file=sys.stderr)
    return found


def opened(directory: Path, kind: str, options: argparse.Namespace) -> Run:
    mode, _, bits = kind.partition(" ")
    if mode not in IN_TORCH:
        return on_provider(directory, bits, options)
    stepper = TorchStepper.of(adopt(directory), options.device)
    stepper.model.to(DTYPES[options.precision])
    if mode == "compiled":
        stepper.model.forward = torch.compile(stepper.model.forward, dynamic=True)
    return passes(stepper)


def on_provider(directory: Path, bits: str, options: argparse.Namespace) -> Run:
    """In onnxruntime on the device: torch's or optimum's float graph, or the packed one of these bits."""
    import onnxruntime

    provider = ort_provider.PROVIDERS[options.device]
    if provider not in onnxruntime.get_available_providers():
        raise Skipped(f"this onnxruntime has no {provider}")
    alone = options.model == "gpt2"
    if bits:
        graph = directory.with_name(f"{directory.name}-{bits}")
        if not alone:
            raise Skipped("packed graphs of an encoder and its decoder are opened only on the CPU")
        finished(graph, partial(export_own, directory, bits))
        ort_provider.require_placed(graph, options.device)
        return passes(ort_provider.Stepper(graph, options.device))
    if not alone:
        graph = directory.with_name(f"{directory.name}-optimum")
        finished(graph, partial(export_float, directory))
        return passes(stock_seq2seq.Stepper(graph, 0, options.device))
    graph = directory.with_name(f"{directory.name}-plain")

    def make(out: Path) -> dict[str, Any]:
        copy_settings(directory, out)
        write_graphs(adopt(directory).model(), out, graph="plain")
        return {}

    finished(graph, make)
    return passes(ort_provider.Stepper(graph, options.device))


def timed(runs: dict[str, Run], works: dict[int, Workload], rounds: int) -> Iterator[dict[tuple[str, int], Times]]:
    """One dictionary of passes a round; the first round, which compiles, is not given out."""
    for count in range(rounds + 1):
        found = {(name, batch): run(work) for batch, work in works.items() for name, run in runs.items()}
        if count:
            yield found


def cut_than_whole(steps: Rounds, batches: Sequence[int]) -> dict[str, dict[str, Any]]:
    """How many times as fast as the whole model each cut one with a goal is, in torch, with that goal."""
    pairs = {
        f"{name} {mode}, batch {batch}": (f"{WHOLE} {mode}, batch {batch}", bound)
        for name, bound in CUT_ON_GPU.items()
        for mode in IN_TORCH
        for batch in batches
    }
    return {
        label: dict(speedup(steps, label, plain, bound))
        for label, (plain, bound) in pairs.items()
        if {label, plain} <= set(steps[0])
    }


def measure(options: argparse.Namespace, root: Path) -> int:
    skipped: dict[str, str] = {}
    claim(Shape.of(options), root)
    contenders = runs(options, root, skipped)
    works = {
        batch: Workload(options.prompt, options.new_tokens, batch, torch.get_num_threads(), options.vocabulary)
        for batch in options.batches
    }
    rounds = list(timed(contenders, works, options.rounds))
    labels = {key: f"{key[0]}, batch {key[1]}" for key in rounds[0]}
    steps = [{labels[key]: sum(times.steps) / len(times.steps) for key, times in each.items()} for each in rounds]
    records = {
        label: {
            "prefill_ms": percentiles(each[name, batch].prefill for each in rounds),
            "per_token_ms": percentiles(step for each in rounds for step in each[name, batch].steps),
            "tokens_per_s": 1e3 * batch / medians(steps)[label],
        }
        for (name, batch), label in labels.items()
    }
    faster = {
        label: speedup(steps, label, labels[f"{WHOLE} {options.modes[0]}", batch], 0)["value"]
        for (_, batch), label in labels.items()
        if (f"{WHOLE} {options.modes[0]}", batch) in labels
    }
    place = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    conditions = {**{key: value for key, value in vars(options).items() if key != "keep"}, "place": place}
    extra = {"skipped": skipped, "contenders": records, f"times_as_fast_as_{WHOLE}_{options.modes[0]}": faster}
    goals = cut_than_whole(steps, options.batches) if options.device == "cuda" else {}  # they are a GPU's
    return conclude(conditions, medians(steps), extra=extra, cut_than_whole=goals)


def main() -> int:
    options = parse()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("skipped: gpu (no CUDA device)")
        return 0
    try:
        with ExitStack() as stack:
            root = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
            return measure(options, root / f"gpu-{options.model}")
    except CompressError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
