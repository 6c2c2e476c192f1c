"""Adaptive KL against forward KL, forward and backward: time (interleaved medians) and peak extra memory on the CPU.

Run: python benchmarks/adaptive_kl.py [--tokens 512] [--vocabulary 50257] [--spread 4] [--rounds 9]
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from compress.functional.divergence import adaptive_kl, forward_kl

Divergence = Callable[[Tensor, Tensor], Tensor]


def logits(tokens: int, vocabulary: int, spread: float) -> tuple[Tensor, Tensor]:
    """Normal logits; a spread of 4 is about as sure as a language model, at 1 the head holds thousands of tokens."""
    generator = torch.Generator().manual_seed(0)
    teacher = spread * torch.randn(tokens, vocabulary, generator=generator)
    student = teacher + torch.randn(tokens, vocabulary, generator=generator)
    return student.requires_grad_(), teacher


def step(divergence: Divergence, student: Tensor, teacher: Tensor) -> None:
    student.grad = None
    torch.autograd.backward(divergence(student, teacher).mean())


def seconds(divergence: Divergence, student: Tensor, teacher: Tensor) -> float:
    start = time.perf_counter()
    step(divergence, student, teacher)
    return time.perf_counter() - start


def peak_bytes(divergence: Divergence, student: Tensor, teacher: Tensor) -> int:
    """The most that was allocated at once beyond the logits, summed from the profiler's allocation events."""
    student.grad = None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step(divergence, student, teacher)
    student.grad = None
    live = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=50257)
    parser.add_argument("--spread", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    student, teacher = logits(options.tokens, options.vocabulary, options.spread)
    one = student.numel() * student.element_size()
    divergences: dict[str, Divergence] = {"forward_kl": forward_kl, "adaptive_kl": adaptive_kl}
    times: dict[str, list[float]] = {name: [] for name in divergences}
    for divergence in divergences.values():
        step(divergence, student, teacher)
    for _ in range(options.rounds):
        for name, divergence in divergences.items():
            times[name].append(seconds(divergence, student, teacher))
    run = f"{options.tokens} tokens x {options.vocabulary}, float32, spread {options.spread}"
    print(f"{run}, {torch.get_num_threads()} threads")
    for name, divergence in divergences.items():
        peak = peak_bytes(divergence, student, teacher)
        print(f"{name:12} {1e3 * statistics.median(times[name]):8.1f} ms   peak extra {peak / one:.2f} x [N, V]")
    ratio = statistics.median(times["adaptive_kl"]) / statistics.median(times["forward_kl"])
    print(f"adaptive / forward time {ratio:.2f}")


if __name__ == "__main__":
    main()
