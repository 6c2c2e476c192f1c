"""Compressed models beside torch, optimum, onnxruntime's quantizers and other runtimes: size, time, memory, as JSON.

Random models of one shape: float, 8-8-8, 4-4-8 and 2-2-8, whole and cut to 8/12 and 6/12, batch 1, greedy. Each round
every contender decodes in turn; ratios are taken within a round, and their median is reported.

GPT-2: the prompt at once, and token by token with a past of --past to --past + --new-tokens.
BART: from a source of --prompt tokens to --new-tokens new ones, encoder and first step included.

Run: python benchmarks/deployment.py --model gpt2 --keep runs/deployment [--peers all|none|torch,optimum,...]
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from comparing import (
    Parser,
    Rounds,
    at_least,
    at_least_two,
    at_most,
    check_positions,
    conclude,
    creatable,
    medians,
    percentiles,
    speedup,
    whole,
    writable,
)
from contender import Contender, Run, Skipped, chosen
from ctranslate2_peer import INT8 as CTRANSLATE2
from ctranslate2_peer import ctranslate2_peers
from goals import AT_MOST, GOALS
from llama_peer import NAMES as LLAMA
from llama_peer import llama_peers
from own_models import Shape, bitsandbytes, claim, eager, own, stock
from stock_graphs import FLOAT, STOCK_INT8, stock_graphs

from compress.errors import CompressError
from compress.measure.bandwidth import MemoryRead
from compress.measure.workload import REST, Times, Workload

REFERENCES = {
    "optimum": (FLOAT,),
    "stock_int8": STOCK_INT8,
    "ctranslate2": (CTRANSLATE2,),
    "llama": LLAMA,
    "torch": ("torch",),
}
"""The contenders that goals compare with: the fastest of each group."""
PEERS = ("torch", "nf4", "int8", "optimum", "ctranslate2", "llama.cpp")
MB = 2**20


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--model", choices=list(GOALS), default="gpt2")
    parser.add_argument("--layers", type=whole(1), help="12, or 6 on either side")
    parser.add_argument("--hidden", type=whole(6), default=768)
    parser.add_argument("--heads", type=whole(1), default=12)
    parser.add_argument("--vocabulary", type=whole(4), help="50257 or 50265")
    parser.add_argument("--positions", type=whole(1), default=1024)
    parser.add_argument("--prompt", type=whole(1), default=128)
    parser.add_argument("--past", type=whole(1), default=64, help="of the first decoded token (gpt2)")
    parser.add_argument("--new-tokens", type=whole(1), help="128, or 32")
    parser.add_argument("--rounds", type=at_least_two, default=7)
    parser.add_argument("--threads", type=whole(1), default=2)
    parser.add_argument("--peers", default="all", help=f"all, none, or some of {','.join(PEERS)}")
    parser.add_argument("--keep", type=creatable, help="directory for the models, which are reused")
    parser.add_argument("--out", type=writable, help="file for the JSON, which is also printed")
    options = parser.parse_args(arguments)
    gpt2 = options.model == "gpt2"
    for name, value in {
        "layers": 12 if gpt2 else 6,
        "vocabulary": 50257 if gpt2 else 50265,
        "new_tokens": 128 if gpt2 else 32,
    }.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    check_positions(parser, options, ("--prompt", options.prompt))
    if gpt2:
        check_positions(parser, options, ("--past with --new-tokens", options.past + options.new_tokens))
    else:
        check_positions(parser, options, ("--new-tokens", options.new_tokens))
        if options.new_tokens < 2:
            parser.error("--new-tokens: 1 leaves no token after the first to time; allowed: 2 or more")
    return options


def contenders(shape: Shape, root: Path, options: argparse.Namespace) -> tuple[list[Contender], dict[str, str]]:
    """Every model that is asked for and available, and why others are skipped."""
    wanted = chosen(options.peers, PEERS)
    source = stock(shape, root)
    offers: dict[str, Callable[[], Iterable[Contender]]] = {
        "torch": lambda: eager(shape, root),
        "nf4": lambda: [bitsandbytes("nf4", shape, root)],
        "int8": lambda: [bitsandbytes("int8", shape, root)],
        "optimum": lambda: stock_graphs(shape, root, options.threads),
        "ctranslate2": lambda: ctranslate2_peers(source, root, options.threads),
        "llama.cpp": lambda: llama_peers(source, root, options.threads, options.hidden),
    }
    found, skipped = list(own(shape, root, options.threads)), {}
    for name in wanted:
        try:
            found += offers[name]()
        except Skipped as reason:
            skipped[name] = str(reason)
            print(f"skipped: {name} ({reason})", file=sys.stderr)
    return found, skipped


def workloads(options: argparse.Namespace) -> dict[str, Workload]:
    """What a pass does, by name: the prompt and the tokens apart, or all at once for a source and its answer."""
    rest = {"batch": 1, "threads": options.threads, "vocabulary": options.vocabulary}
    if options.model == "bart":
        return {"generate": Workload(options.prompt, options.new_tokens - 1, **rest)}
    return {
        "prefill": Workload(options.prompt, 0, **rest),
        "decode": Workload(options.past, options.new_tokens, **rest),
    }


def timed(runs: dict[str, Run], works: dict[str, Workload], rounds: int) -> tuple[list[dict[str, Any]], list[float]]:
    """Rounds of what each pass took, {contender: {work: Times}}, and the bandwidth of memory in each of them."""
    memory, found, bandwidths = MemoryRead(), [], []
    for count in range(rounds + 1):
        times: dict[str, dict[str, Times]] = {name: {} for name in runs}
        for work_name, work in works.items():
            for name, run in runs.items():
                time.sleep(REST)
                times[name][work_name] = run(work)
        bandwidth = memory.bytes_per_second()
        if count:
            found.append(times)
            bandwidths.append(bandwidth)
        print(f"round {count} of {rounds}", file=sys.stderr, flush=True)
    return found, bandwidths


def seconds(rounds: list[dict[str, Any]], of: Callable[[dict[str, Times]], float]) -> Rounds:
    return [{name: of(times) for name, times in each.items()} for each in rounds]


def decoded(times: dict[str, Times]) -> float:
    """The median token of a pass."""
    return float(np.median((times.get("decode") or times["generate"]).steps))


def generated(times: dict[str, Times]) -> float:
    """The whole pass."""
    return times["generate"].prefill + sum(times["generate"].steps)


def prefilled(times: dict[str, Times]) -> float:
    """The prompt at once, or the encoder and the first token."""
    return (times.get("prefill") or times["generate"]).prefill


def record(
    each: Contender, rounds: list[dict[str, Any]], works: dict[str, Workload], bandwidth: float
) -> dict[str, Any]:
    """Every figure of a contender."""
    own_rounds = [times[each.name] for times in rounds]
    main = "decode" if "decode" in works else "generate"
    steps = [step for times in own_rounds for step in times[main].steps]
    first = "prefill" if "prefill" in works else "generate"
    found: dict[str, Any] = {
        "bytes": each.bytes,
        "megabytes": each.bytes / MB,
        "prefill_ms": percentiles(times[first].prefill for times in own_rounds),
        "per_token_ms": percentiles(steps),
    }
    if main == "generate":
        found["generate_ms"] = percentiles(map(generated, own_rounds))
    if each.step_bytes is not None:
        floor = each.step_bytes() / bandwidth
        found |= {"weight_bytes_per_token": each.step_bytes(), "floor_ms": 1e3 * floor}
        found["above_floor"] = float(np.median(steps)) / floor
    return {**found, **each.fresh(works[main]), **each.facts}


def figures(
    model: str, rounds: list[dict[str, Any]], records: dict[str, Any], parameters: int
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Each goal whose contenders were timed: its kind, its name, and the figure with its bound."""
    parts = {"decode": decoded, "generate": generated, "prefill": prefilled}
    for kind, goals in GOALS[model].items():
        for name, bound in goals.items():
            if name not in records:
                continue
            part, _, against = kind.partition("_than_")
            if against:
                others = [other for other in REFERENCES[against] if other in records]
                if not others:
                    continue
                timings = seconds(rounds, parts[part])
                best = min(others, key=lambda other: medians(timings)[other])
                yield kind, name, {**speedup(timings, name, best, bound), "than": best}
            elif (value := plain_figure(kind, records[name], records, parameters)) is not None:
                yield kind, name, dict(at_most(value, bound) if kind in AT_MOST else at_least(value, bound))


def plain_figure(kind: str, own_record: dict[str, Any], records: dict[str, Any], parameters: int) -> float | None:
    if kind == "smaller":
        return 4 * parameters / own_record["bytes"]
    if kind == "export_seconds":
        return float(own_record["packing_s"] + own_record["writing_s"])
    if kind == "peak_memory":
        return own_record["peak_rss_bytes"] / records[FLOAT]["peak_rss_bytes"] if FLOAT in records else None
    return float(own_record[kind])


def against(timings: Rounds, names: Iterable[str]) -> dict[str, dict[str, float]]:
    """How many times as fast as each reference every contender is, medians over rounds; no bound."""
    return {
        f"than_{reference}": {name: speedup(timings, name, reference, 0)["value"] for name in timings[0]}
        for reference in names
        if reference in timings[0]
    }


def measure(options: argparse.Namespace, root: Path) -> int:
    shape = Shape.of(options)
    chosen(options.peers, PEERS)
    claim(shape, root)
    found, skipped = contenders(shape, root, options)
    works = workloads(options)
    rounds, bandwidths = timed({each.name: each.open() for each in found}, works, options.rounds)
    bandwidth = max(bandwidths)
    records = {each.name: record(each, rounds, works, bandwidth) for each in found}
    main = seconds(rounds, generated if options.model == "bart" else decoded)
    parameters = shape.parameters()
    by_kind: dict[str, dict[str, dict[str, Any]]] = {}
    for kind, name, figure in figures(options.model, rounds, records, parameters):
        by_kind.setdefault(kind, {})[name] = figure
    conditions = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    conditions |= {"batch": 1, "precision": "float32", "parameters": parameters, "memory_bytes_per_s": bandwidth}
    extra = {
        "skipped": skipped,
        "contenders": records,
        "times_as_fast": against(main, ("torch", FLOAT, *STOCK_INT8, "float")),
    }
    return conclude(conditions, medians(main), extra=extra, out=options.out, **by_kind)


def main() -> int:
    options = parse()
    torch.set_num_threads(options.threads)
    try:
        with ExitStack() as stack:
            root = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
            return measure(options, root / options.model)
    except CompressError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
