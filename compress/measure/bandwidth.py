"""How fast this machine reads memory, as a product of a matrix and a vector reads it."""

from __future__ import annotations

import time

import torch

BYTES = 2**28
"""Of the matrix: many times what processor caches hold."""
COLUMNS = 2**13
READS = 4


class MemoryRead:
    """A float32 matrix of 256 MiB that is multiplied by a vector: every byte is read once, and hardly any is written.

    A product of this kind is what decoding a token consists of, and it read faster here than sums and copies did.
    """

    def __init__(self) -> None:
        self._matrix = torch.ones(BYTES // 4 // COLUMNS, COLUMNS)
        self._vector = torch.ones(COLUMNS)
        self._out = torch.empty(len(self._matrix))

    def bytes_per_second(self) -> float:
        """The fastest of a few reads, with the threads that torch has now; what else runs can only slow one down."""
        return max(BYTES / self._seconds() for _ in range(READS))

    def _seconds(self) -> float:
        start = time.perf_counter()
        torch.mv(self._matrix, self._vector, out=self._out)
        return time.perf_counter() - start
