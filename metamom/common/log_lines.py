"""Lines of progress on standard error, where there is no terminal for a progress bar."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping

EVERY = 30.0  # seconds between lines, at most


class LogLines:
    """Prints the progress of a run: a line every 30 seconds, and one whenever the caller asks for it.

        train sinusoid: 1200/2000 it, loss 0.8213, validation 0.9034 ± 0.0512, 85.3 it/s, 0:09 left

    Speed and remaining time are those since the end of the first step, which may have compiled the model.

    Args:
        label: the start of every line.
        total: total number of steps.
        unit: unit of the steps: ``"it"``, ``"epoch"``.
        since: completed steps now, to measure the speed from now on, and not from the end of the first step.
        clock: returns seconds.
    """

    def __init__(
        self, label: str, total: int, unit: str, since: int | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.label = label
        self.total = total
        self.unit = unit
        self._clock = clock
        self._last = self._since = clock()
        self._from = since

    def stepped(self, done: int, shown: Mapping[str, str], now: bool = False) -> None:
        """Print a line if one is due.

        Args:
            done: the completed steps.
            shown: values by name.
            now: print one in any case.
        """
        time = self._clock()
        if now or time - self._last >= EVERY:
            self._last = time
            values = [f"{name} {value}" for name, value in shown.items()]
            say(f"{self.label}: " + ", ".join([f"{done}/{self.total} {self.unit}", *values, *self._speed(done, time)]))
        if self._from is None:
            self._from, self._since = done, time

    def _speed(self, done: int, time: float) -> list[str]:
        first = done - 1 if self._from is None else self._from
        seconds = time - self._since
        if done <= first or seconds <= 0:
            return []
        rate = (done - first) / seconds
        speed = f"{rate:.3g} {self.unit}/s" if rate < 100 else f"{rate:.0f} {self.unit}/s"
        return [speed, *([f"{duration((self.total - done) / rate)} left"] if done < self.total else [])]


def duration(seconds: float) -> str:
    """Seconds as ``0:09``, ``12:34`` or ``1:02:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def say(line: str) -> None:
    """Write a line to standard error at once, and in one piece, since several processes may write there."""
    if sys.stderr is not None:
        sys.stderr.write(line + "\n")
        sys.stderr.flush()
