"""The cost of adaptive KL compared with forward KL, forward and backward: time and peak memory on the CPU, as JSON.

Run: python benchmarks/adaptive_kl.py [--tokens 512] [--vocabulary 50257] [--spread 4] [--rounds 9]
"""

import sys
from functools import partial

import torch
from comparing import Parser, Step, at_least_two, at_most, conclude, medians, ratio, timed, whole
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from compress.functional.divergence import adaptive_kl, forward_kl

TIME = 1.5
"""What adaptive KL may cost at most, as a multiple of forward KL."""
MEMORY = 1.0
"""How much higher its peak may be, in chunks [N, V]."""


def logits(tokens: int, vocabulary: int, spread: float) -> tuple[Tensor, Tensor]:
    """Normal logits; a spread of 4 is about as sure as a language model, at 1 the head holds thousands of tokens."""
    generator = torch.Generator().manual_seed(0)
    teacher = spread * torch.randn(tokens, vocabulary, generator=generator)
    student = teacher + torch.randn(tokens, vocabulary, generator=generator)
    return student.requires_grad_(), teacher


def gradient(divergence: partial[Tensor], student: Tensor) -> None:
    student.grad = None
    torch.autograd.backward(divergence().mean())


def peak_bytes(step: Step, student: Tensor) -> int:
    """The most that was allocated at once beyond the logits, summed from the profiler's allocation events."""
    student.grad = None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    student.grad = None
    live = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("--tokens", type=whole(1), default=512)
    parser.add_argument("--vocabulary", type=whole(1), default=50257)
    parser.add_argument("--spread", type=float, default=4.0)
    parser.add_argument("--rounds", type=at_least_two, default=9)
    options = parser.parse_args()
    student, teacher = logits(options.tokens, options.vocabulary, options.spread)
    steps: dict[str, Step] = {
        divergence.__name__: partial(gradient, partial(divergence, student, teacher), student)
        for divergence in (forward_kl, adaptive_kl)
    }
    rounds = timed(steps, options.rounds)
    chunk = student.numel() * student.element_size()
    forward, ours = (peak_bytes(steps[name], student) / chunk for name in ("forward_kl", "adaptive_kl"))
    return conclude(
        {**vars(options), "precision": "float32", "threads": torch.get_num_threads()},
        medians(rounds),
        ratios={"adaptive_kl": ratio(rounds, "adaptive_kl", "forward_kl", TIME)},
        extra_chunks={"adaptive_kl": {**at_most(ours - forward, MEMORY), "peak": ours, "forward_kl": forward}},
    )


if __name__ == "__main__":
    sys.exit(main())
