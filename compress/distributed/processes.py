"""Which process of a run this is. There is one by default, and several under ``accelerate launch``.

Every process runs the same code over the same files. Only process 0, the main one, writes results, measures and prints.
"""

from __future__ import annotations

import os

_COUNT = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_RANK = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
_LOCAL = ("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK")
"""torch's own variables first, then those of MPI launchers."""


def count() -> int:
    """Return the number of processes of this run, on all machines."""
    return _from_launcher(_COUNT, 1)


def rank() -> int:
    """Return this process's number, from 0."""
    return _from_launcher(_RANK, 0) if count() > 1 else 0


def local_rank() -> int:
    """Return this process's number on its machine, from 0."""
    return _from_launcher(_LOCAL, rank()) if count() > 1 else 0


def is_main() -> bool:
    """Return whether this is process 0."""
    return rank() == 0


def share(size: int) -> slice:
    """Return which of ``size`` items this process owns. Each item has one owner. Shares differ by at most one item."""
    return slice(rank() * size // count(), (rank() + 1) * size // count())


def on_cpu() -> bool:
    """Return whether the launcher was started with ``--cpu``."""
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true")


def alone_by_mistake() -> bool:
    """Return whether ``accelerate launch --cpu`` started one process instead of several. Only mpirun starts several."""
    return count() == 1 and on_cpu() and "MASTER_ADDR" in os.environ


def _from_launcher(names: tuple[str, ...], otherwise: int) -> int:
    return next((int(os.environ[name]) for name in names if os.environ.get(name)), otherwise)
