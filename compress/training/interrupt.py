"""Ctrl-C that waits until the current step is done, so that the saved state lies between two steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType


class Interrupt:
    """A context manager around a loop. The first Ctrl-C sets ``asked``; a second one stops at once.

    Outside the main thread Python allows no signal handlers, and Ctrl-C keeps its usual effect.
    """

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> Interrupt:
        self.main = threading.current_thread() is threading.main_thread()
        if self.main:
            self.before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        if self.main:
            signal.signal(signal.SIGINT, self.before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
