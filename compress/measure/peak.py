"""``python -m compress.measure.peak DIR {torch|onnx} WORKLOAD``: load time and peak memory of one process that decodes.

Prints one line of JSON. It runs in a process of its own for two reasons. A peak also counts memory that was freed
earlier. The peak of an exported artifact must include numpy and onnxruntime only.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from compress.errors import CompressError
from compress.measure.workload import OnnxStepper, Stepper, Workload, timed_pass


def measure_in_fresh_process(directory: Path, kind: str, work: Workload) -> dict[str, float | int]:
    """Run this module on a directory and return ``load_s`` and ``peak_rss_bytes``.

    ``load_s`` is the time from files to a model that can decode. In either runtime it excludes imports, and the hashing
    that opening an artifact does.
    """
    paths = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, "-m", "compress.measure.peak", str(directory), kind, json.dumps(asdict(work))]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = next(reversed(done.stderr.strip().splitlines()), f"exit code {done.returncode}")
        raise CompressError(f"{directory}: peak memory could not be measured ({reason})")
    found: dict[str, float | int] = json.loads(done.stdout.splitlines()[-1])
    return found


def peak_rss() -> int:
    """Return peak memory of this process since its start, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # rusage also counts the parent, which was copied to start this process
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _opener(directory: Path, kind: str, threads: int) -> Callable[[], Stepper]:
    if kind == "onnx":
        return lambda: OnnxStepper(directory, threads)
    import torch

    from compress.artifact import adopt
    from compress.measure.torch_stepper import TorchStepper
    from compress.models.loading import build

    torch.set_num_threads(threads)
    artifact = adopt(directory)
    with torch.device("meta"):
        build(artifact.config())  # imports the transformers classes
    return lambda: TorchStepper.of(artifact, "cpu")


def main(directory: str, kind: str, workload: str) -> None:
    """Open the artifact, decode once, and print load time and peak memory."""
    work = Workload(**json.loads(workload))
    opener = _opener(Path(directory), kind, work.threads)
    start = time.perf_counter()
    stepper = opener()
    load = time.perf_counter() - start
    timed_pass(stepper, work)
    sys.stdout.write(json.dumps({"load_s": load, "peak_rss_bytes": peak_rss()}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
