"""What the processes of a run compute together. With one process, nothing happens.

Every process must call each function except ``join``, in the same order. Shapes: N rows of one process.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from compress.distributed.processes import count, is_main, local_rank
from compress.errors import LostError, UserError

_SPLITTING = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}
_PATIENCE = timedelta(days=1)
"""Timeout of the other processes while the main one exports and measures. A process that ends is noticed at once."""


def join(device: str) -> None:
    """Connect this process to the others of its run, once. Without others, nothing happens.

    On CPUs, this process disconnects when it exits, also after an error. Otherwise, a thread of gloo may need the
    interpreter while that shuts down, and the process aborts with SIGABRT (pytorch issue 190489). NCCL has no such
    thread, and disconnecting from it can wait for the others forever.

    Raises UserError if the launcher was asked to split a model, or to start more processes than there are devices.
    """
    for variable, name in _SPLITTING.items():
        if os.environ.get(variable, "").lower() in ("1", "true", "yes"):
            raise UserError(
                f"accelerate launch: {name} splits a model, but a stage needs the whole model; use --multi_gpu"
            )
    if count() == 1 or dist.is_initialized():
        return
    if device == "cuda" and local_rank() >= torch.cuda.device_count():
        raise UserError(
            f"accelerate launch: process {local_rank()} of this machine has no CUDA device of its own; "
            f"allowed: --num_processes up to {torch.cuda.device_count()}, or --device cpu"
        )
    from accelerate import PartialState  # reads the environment variables of every launcher

    backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
    try:
        PartialState(cpu=device == "cpu", backend=backend, timeout=_PATIENCE)
        if not dist.is_initialized():
            raise RuntimeError("the launcher gives the number of processes but no address; use torchrun")
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the processes of this run cannot reach each other: {error}") from error
    if backend == "gloo":
        atexit.register(leave)


def leave() -> None:
    """Disconnect at the end of a program."""
    if dist.is_initialized():
        dist.destroy_process_group()


def wait() -> None:
    """Wait until every process has reached this point."""
    mean(torch.zeros(1))


@contextmanager
def main_first() -> Iterator[None]:
    """Run the block first in the main process, and then in the others, which can use what it wrote."""
    if not is_main():
        wait()
    yield
    if is_main():
        wait()


def mean(tensor: Tensor) -> Tensor:
    """Return the mean of a tensor over the processes, bit for bit the same on each. One process returns ``tensor``."""
    if count() == 1:
        return tensor
    total = tensor.detach().clone(memory_format=torch.contiguous_format)
    with _together():
        dist.all_reduce(total)
    return total / count()


def means(values: Sequence[float]) -> list[float]:
    """Return the mean of each number over the processes."""
    found: list[float] = mean(torch.tensor(values, dtype=torch.float64)).tolist()
    return found


def anywhere(flag: bool) -> bool:
    """Return whether the flag is true in any process."""
    return means([float(flag)])[0] > 0


def gathered(rows: Tensor) -> Tensor:
    """Return the rows [N, ...] of every process, in the order of the processes. N may differ."""
    if count() == 1:
        return rows
    with _together():
        sizes = [torch.zeros(1, dtype=torch.long, device=rows.device) for _ in range(count())]
        dist.all_gather(sizes, torch.tensor([len(rows)], device=rows.device))
        padded = rows.new_zeros(int(max(sizes)), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
    return torch.cat([part[: int(size)] for part, size in zip(parts, sizes, strict=True)])


def from_main(text: str) -> str:
    """Return the text of the main process, on every process."""
    if count() == 1:
        return text
    encoded = list(text.encode()) if is_main() else []
    return bytes(gathered(torch.tensor(encoded, dtype=torch.uint8)).tolist()).decode()


@contextmanager
def _together() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise LostError("another process of this run has ended; see its error message") from error
