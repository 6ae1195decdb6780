"""Handle Ctrl-C and SIGTERM at the end of a step."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

NOTED = b"\ninterrupted: finishing the current step first; interrupt again to stop at once.\n"


class TrainingInterrupted(KeyboardInterrupt):
    """Training was stopped by a signal, after the current step was finished and saved.

    Attributes:
        signal_number: ``signal.SIGINT`` (Ctrl-C) or ``signal.SIGTERM``.
        unfinished: whether a resumed run has something left to do.
    """

    def __init__(self, message: str, signal_number: int, unfinished: bool = True) -> None:
        super().__init__(message, signal_number)  # both, so that it can be pickled between processes
        self.signal_number = signal_number
        self.unfinished = unfinished

    def __str__(self) -> str:
        return str(self.args[0])


class Interrupts:
    """Inside this context, the first Ctrl-C or SIGTERM is only recorded in `caught`; a second one acts at once.

    A message on standard error says so immediately, since the current step may take long, especially if it is being
    compiled. An ignored signal stays ignored. Handlers can only be set in the main thread. In other threads nothing is
    caught, and signals act as usual.
    """

    def __init__(self) -> None:
        self.caught: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            heard = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._note) for number in heard}
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.caught = number
        self._restore()
        os.write(2, NOTED)  # not print, since the signal may have interrupted one

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
