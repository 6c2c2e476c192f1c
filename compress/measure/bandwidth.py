"""Read bandwidth of this machine's memory, measured with matrix-vector products."""

from __future__ import annotations

import time

import torch

BYTES = 2**28
"""Size of the matrix: many times the size of processor caches."""
COLUMNS = 2**13
READS = 4


class MemoryRead:
    """A float32 matrix of 256 MiB that is multiplied by a vector. Every byte is read once; hardly any is written.

    Decoding a token consists of such products. In tests they also read faster than sums and copies.
    """

    def __init__(self) -> None:
        self._matrix = torch.ones(BYTES // 4 // COLUMNS, COLUMNS)
        self._vector = torch.ones(COLUMNS)
        self._out = torch.empty(len(self._matrix))

    def bytes_per_second(self) -> float:
        """Return the rate of the fastest of a few reads with torch's current threads. Other work only slows reads."""
        return max(BYTES / self._seconds() for _ in range(READS))

    def _seconds(self) -> float:
        start = time.perf_counter()
        torch.mv(self._matrix, self._vector, out=self._out)
        return time.perf_counter() - start
