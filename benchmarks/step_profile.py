"""Where the time of decoding steps goes: the share of each operator, from onnxruntime's profiler, as JSON.

One exported directory of this project, batch 1, greedy. The prompt (or the source and the first token) is run before
and not counted. Profiling slows short nodes down, so the shares are of a profiled step, not of a timed one.

Run: python benchmarks/step_profile.py DIRECTORY [--past 64] [--new-tokens 32] [--threads 2]
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnxruntime as ort
from comparing import Parser, conclude, whole, writable

from compress.errors import CompressError, UserError
from compress.onnx.names import DECODER_FILE, ENCODER_FILE, MODEL_FILE
from compress.onnx.runtime import Runtime
from compress.onnx.runtime.opening import decoding_settings

Event = dict[str, Any]
BRANCHING = frozenset({"If", "Loop", "Scan"})
"""Nodes whose time is that of the nodes inside, which have events of their own."""
LARGEST = 10


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("directory", type=Path, metavar="DIRECTORY")
    parser.add_argument("--past", type=whole(1), default=64, help="tokens before the steps (of the source, for BART)")
    parser.add_argument("--new-tokens", type=whole(1), default=32, help="steps")
    parser.add_argument("--threads", type=whole(1), default=2)
    parser.add_argument("--out", type=writable, help="file for the JSON, which is also printed")
    return parser.parse_args(arguments)


def profiled(directory: Path, past: int, new_tokens: int, threads: int) -> list[Event]:
    """The profiler's events of the decoder, prompt and all.

    Raises:
        UserError: no graph of this project is there, or more tokens are asked for than it has positions.
    """
    alone = (directory / MODEL_FILE).is_file()
    decoder = MODEL_FILE if alone else DECODER_FILE
    if not (directory / decoder).is_file():
        raise UserError(f"{directory}: has neither {MODEL_FILE} nor {DECODER_FILE}; give an exported directory")
    settings = decoding_settings(directory)
    asked = past + new_tokens if alone else max(past, new_tokens + 1)
    if asked > settings["context"]:
        raise UserError(f"--past {past} and --new-tokens {new_tokens} exceed the {settings['context']} positions")
    with TemporaryDirectory() as place:
        files = (decoder,) if alone else (ENCODER_FILE, decoder)
        sessions = {name: _session(directory / name, threads, Path(place)) for name in files}
        vocabulary = sessions[decoder].get_outputs()[0].shape[-1]
        ids = np.random.default_rng(0).integers(0, vocabulary, (1, past))
        decoding, logits = Runtime(sessions, settings).begin(ids, longest=past + new_tokens)
        for _ in range(new_tokens):
            logits = decoding.feed(logits.argmax(-1)[:, None])[:, -1]
        found: list[Event] = json.loads(Path(sessions[decoder].end_profiling()).read_text())
        return found


def _session(file: Path, threads: int, place: Path) -> ort.InferenceSession:
    """As the runtime opens it, profiled if it decodes."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if file.name == ENCODER_FILE:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    else:
        options.enable_profiling = True
        options.profile_file_prefix = str(place / "profile")
    return ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def steps_of(events: Sequence[Event], steps: int) -> tuple[list[Event], list[Event]]:
    """The last ``steps`` runs of the graph, and the nodes in them; a node that branches is left to those inside."""
    runs = sorted((each for each in events if each["name"] == "model_run"), key=lambda each: each["ts"])[-steps:]
    start = runs[0]["ts"]
    kernels = (each for each in events if each["name"].endswith("_kernel_time") and each["ts"] >= start)
    return runs, [each for each in kernels if each["args"]["op_name"] not in BRANCHING]


def shares(events: Sequence[Event], steps: int) -> dict[str, Any]:
    """Of the time of all nodes: the part of each operator and of the largest nodes, and microseconds of a step."""
    runs, kernels = steps_of(events, steps)
    total = sum(each["dur"] for each in kernels)

    def parts(key: Callable[[Event], str]) -> dict[str, dict[str, float]]:
        found: dict[str, list[int]] = defaultdict(list)
        for each in kernels:
            found[key(each)].append(each["dur"])
        largest = sorted(found.items(), key=lambda item: -sum(item[1]))
        return {
            name: {"share": sum(each) / total, "us": sum(each) / steps, "nodes": len(each) / steps}
            for name, each in largest
        }

    nodes = parts(lambda each: each["name"].removesuffix("_kernel_time"))
    return {
        "operators": parts(lambda each: each["args"]["op_name"]),
        "largest_nodes": dict(list(nodes.items())[:LARGEST]),
        "nodes_us": total / steps,
        "run_us": sum(each["dur"] for each in runs) / steps,
    }


def main() -> int:
    options = parse()
    try:
        events = profiled(options.directory, options.past, options.new_tokens, options.threads)
    except CompressError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    conditions = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    conditions |= {"batch": 1, "onnxruntime": ort.__version__}
    return conclude(conditions, {}, extra=shares(events, options.new_tokens), out=options.out)


if __name__ == "__main__":
    sys.exit(main())
