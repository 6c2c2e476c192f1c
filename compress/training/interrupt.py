"""Ctrl-C that waits for the step at hand, so that what is saved is the state between two steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType


class Interrupt:
    """A context manager around a loop: the first Ctrl-C sets ``asked``, a second one stops at once.

    Off the main thread, where Python allows no handlers, nothing changes.
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
