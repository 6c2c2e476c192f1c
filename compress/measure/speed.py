"""Decoding speed of artifacts: prompt and tokens timed separately, all artifacts interleaved in one run."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from rich.console import Console

from compress.artifact import Artifact
from compress.data import Data
from compress.errors import UserError
from compress.measure.bandwidth import MemoryRead
from compress.measure.floor import model_step_bytes
from compress.measure.measurement import Measurement
from compress.measure.peak import measure_in_fresh_process
from compress.measure.torch_stepper import TorchStepper
from compress.measure.workload import REST, OnnxStepper, Stepper, Times, Workload, timed_pass
from compress.models import context_of
from compress.onnx.step_bytes import directory_step_bytes
from compress.problem import Problem

NOT_MEASURED = "not measured: no CUDA device"
CPU_ONLY = "not measured: the exported graph is for the CPU"


class Speed(Measurement):
    """Latency, throughput, load time and peak memory of greedy decoding, in float32 or in packed arithmetic.

    ``prefill_ms`` is the time from a prompt to its first new token. ``per_token_ms`` is the time of each further token.
    Both are medians and 95th percentiles over ``rounds``. ``tokens_per_s`` = batch x tokens / time, for the further
    tokens only.

    In each round every artifact decodes once, in turn, after a pause of 0.1 s. A busy moment of the machine then
    affects all artifacts, and the idle threads of one runtime do not slow the next. A first round is not counted.

    ``load_s`` and ``peak_rss_bytes`` come from a fresh process on the CPU. With a CUDA device, torch artifacts are also
    timed on it, under ``gpu``.

    ``weight_bytes_per_token`` is the size of the weights, as stored, that one step needs. ``floor_ms`` is the time in
    which the CPU reads them from memory. ``above_floor`` = time of a step / ``floor_ms``. The bandwidth is the highest
    of all rounds, each of which reads 256 MiB. Weights in processor caches can be read faster.
    """

    renamed: ClassVar[Mapping[str, str]] = {"prompt": "prompt_tokens"}

    type: Literal["speed"] = "speed"
    prompt_tokens: int = Field(64, ge=1)
    """Tokens of the prompt (of the source, for sequence-to-sequence models)."""
    new_tokens: int = Field(64, ge=1)
    """Number of tokens after the first, each of which is timed."""
    batch: int = Field(1, ge=1)
    """Rows per batch."""
    threads: int | None = Field(None, ge=1, le=1024)
    """Threads of both runtimes. The default is one per core."""
    rounds: int = Field(10, ge=1)

    def run(
        self, artifacts: Mapping[str, Artifact], *, data: Data | None, device: str, console: Console | None
    ) -> dict[str, dict[str, Any]]:
        chosen = self.chosen(artifacts)
        for problem in self.problems({name: artifact.config() for name, artifact in chosen.items()}, data):
            raise UserError(problem.inside(self.type))
        work = self.workload(min(artifact.config().vocab_size for artifact in chosen.values()))
        steppers = {name: _stepper(artifact, work) for name, artifact in chosen.items()}
        times, bandwidth = self.timed(steppers, work)
        gpu = {name: artifact for name, artifact in chosen.items() if device != "cpu" and not _exported(artifact)}
        on_gpu = self._rounds({name: TorchStepper.of(artifact, device) for name, artifact in gpu.items()}, work)
        records = {}
        for name, artifact in chosen.items():
            fresh = measure_in_fresh_process(artifact.path, "onnx" if _exported(artifact) else "torch", work)
            no_gpu = CPU_ONLY if _exported(artifact) and device != "cpu" else NOT_MEASURED
            speed = {**summary(times[name], work), **fresh}
            speed |= floor(_step_bytes(artifact, steppers[name]), bandwidth, speed["per_token_ms"]["p50"])
            speed["gpu"] = summary(on_gpu[name], work) if name in on_gpu else no_gpu
            records[name] = {"speed": speed, "conditions": {"speed": self._conditions(artifact, work, bandwidth)}}
        return records

    def problems(self, configs: Mapping[str, Any], data: Data | None) -> Iterator[Problem]:
        # the prompt and the new tokens share a decoder's positions; a source has the encoder to itself
        for name, config in configs.items():
            context, apart = context_of(config), config.is_encoder_decoder
            asked = max(self.prompt_tokens, self.new_tokens + 1) if apart else self.prompt_tokens + self.new_tokens
            if asked > context:
                given = f"prompt_tokens {self.prompt_tokens} and new_tokens {self.new_tokens}"
                yield Problem((), f"{given} exceed the {context} positions of {name}")

    def timed(self, steppers: Mapping[str, Stepper], work: Workload) -> tuple[dict[str, list[Times]], float]:
        """Decode with every stepper in each round. Return their times, and the memory bandwidth in bytes per second."""
        reader, bandwidths = MemoryRead(), list[float]()
        with _torch_threads(work.threads):
            times = self._rounds(steppers, work, lambda: bandwidths.append(reader.bytes_per_second()))
        return times, max(bandwidths)

    def workload(self, vocabulary: int) -> Workload:
        """Return the workload of every model. ``vocabulary`` is the smallest of all, so every token is valid."""
        threads = self.threads or len(os.sched_getaffinity(0))
        return Workload(self.prompt_tokens, self.new_tokens, self.batch, threads, vocabulary)

    def _rounds(
        self, steppers: Mapping[str, Stepper], work: Workload, after_round: Callable[[], None] = lambda: None
    ) -> dict[str, list[Times]]:
        times: dict[str, list[Times]] = {name: [] for name in steppers}
        for count in range(self.rounds + 1):
            for name, stepper in steppers.items():
                time.sleep(REST)
                found = timed_pass(stepper, work)
                if count:
                    times[name].append(found)
            after_round()
        return times

    def _conditions(self, artifact: Artifact, work: Workload, bandwidth: float) -> dict[str, Any]:
        return {
            "runtime": _runtime(artifact),
            "device": "cpu",
            "prompt_tokens": work.prompt,
            "new_tokens": work.new_tokens,
            "batch": work.batch,
            "threads": work.threads,
            "rounds": self.rounds,
            "order": f"interleaved, each after {REST} s of rest, after one round of warm-up",
            "memory_bytes_per_s": round(bandwidth),
        }


def compare_with_first(records: Sequence[dict[str, Any]]) -> None:
    """Add ``faster`` to the speed of each record: how many times as fast it is as the first, prompt and token."""
    first = records[0]["speed"]
    for record in records:
        own = record["speed"]
        own["faster"] = {
            part: first[f"{part}_ms"]["p50"] / own[f"{part}_ms"]["p50"] for part in ("prefill", "per_token")
        }


def _exported(artifact: Artifact) -> bool:
    return "onnx" in artifact.traits


def _runtime(artifact: Artifact) -> str:
    if _exported(artifact):
        return OnnxStepper.runtime
    emulated = ", quantization emulated in float32" if artifact.manifest.quantization else ""
    return TorchStepper.runtime + emulated


def _stepper(artifact: Artifact, work: Workload) -> Stepper:
    return OnnxStepper(artifact.path, work.threads) if _exported(artifact) else TorchStepper.of(artifact, "cpu")


def _step_bytes(artifact: Artifact, stepper: Stepper) -> int:
    return model_step_bytes(stepper.model) if isinstance(stepper, TorchStepper) else directory_step_bytes(artifact.path)


def floor(step_bytes: int, bandwidth: float, per_token_ms: float) -> dict[str, float]:
    """Return the time to read the weights of one step from memory, and the ratio of the time of a step to it."""
    floor_ms = 1000 * step_bytes / bandwidth
    return {"weight_bytes_per_token": step_bytes, "floor_ms": floor_ms, "above_floor": per_token_ms / floor_ms}


def summary(times: Sequence[Times], work: Workload) -> dict[str, Any]:
    """Return medians and 95th percentiles in milliseconds, and new tokens per second."""
    steps = [step for each in times for step in each.steps]
    return {
        "prefill_ms": _percentiles([each.prefill for each in times]),
        "per_token_ms": _percentiles(steps),
        "tokens_per_s": work.batch * len(steps) / sum(steps),
    }


def _percentiles(seconds: Sequence[float]) -> dict[str, float]:
    return {name: float(np.percentile(seconds, at)) * 1000 for name, at in (("p50", 50), ("p95", 95))}


@contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
