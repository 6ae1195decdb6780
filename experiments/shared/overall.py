"""The progress of many runs: one bar in a terminal; elsewhere a line when a run ends, and one every 30 seconds."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from tqdm import tqdm

from metamom.common.log_lines import LogLines
from metamom.training.callbacks import Callback, RunState

OFTEN = 0.3  # seconds between drawings of the bar


class Overall:
    """Shows how many runs have ended; a context manager.

        compare: 3/24 runs, beta0.1-zero_lr0.03_seed0 at 400/2000 it, 0.05 runs/s, 7:00 left

    Args:
        label: the start of every line.
        total: the number of runs.
        ended: of these, the number that had ended before.
    """

    def __init__(self, label: str, total: int, ended: int = 0) -> None:
        self.ended = ended
        self._bar = tqdm(total=total, initial=ended, desc=label, unit="run", disable=None)
        self._drawn = time.monotonic()
        self._lines = LogLines(label, total, "runs", since=ended) if self._bar.disable else None

    def __enter__(self) -> Overall:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def now(self, doing: str = "") -> None:
        """Show what is done at the moment; outside of a terminal at most every 30 seconds."""
        self._show(doing, now=False)

    def end(self, name: str = "") -> None:
        """Count a run that has ended."""
        self.ended += 1
        self._bar.update()
        self._show(f"{name} finished" if name else "", now=True)

    def _show(self, text: str, *, now: bool) -> None:
        if now or time.monotonic() - self._drawn >= OFTEN:
            self._drawn = time.monotonic()
            self._bar.set_postfix_str(text)
        if self._lines is not None:
            name, _, rest = text.partition(" ")
            self._lines.stepped(self.ended, {name: rest} if text else {}, now=now)


class Steps(NamedTuple):
    """The progress of many runs together, in steps.

    Attributes:
        total: expected steps of all runs.
        done: returns the completed ones.
        unit: what they are.
    """

    total: int
    done: Callable[[], int]
    unit: str = "step"


class OverallSteps:
    """Shows the steps that all runs together have taken; used like `Overall`.

    Args:
        label: the start of every line.
        steps: what is counted.
    """

    def __init__(self, label: str, steps: Steps) -> None:
        self._steps, since = steps, steps.done()
        self._bar = tqdm(total=steps.total, initial=since, desc=label, unit=steps.unit, disable=None)
        self._lines = LogLines(label, steps.total, f"{steps.unit}s", since=since) if self._bar.disable else None
        self._complete = False  # and shown

    def __enter__(self) -> OverallSteps:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def now(self, doing: str = "") -> None:
        """Show the steps taken so far; outside of a terminal at most every 30 seconds, and once at the end."""
        done = self._steps.done()
        self._bar.update(done - self._bar.n)
        if self._lines is not None and not self._complete:
            self._complete = done == self._steps.total
            self._lines.stepped(done, {}, now=self._complete)

    def end(self, name: str = "") -> None:
        """Show the steps after a run has ended."""
        self.now()


class ShowRun(Callback):
    """Shows a run as a part of many.

    Args:
        overall: of all runs.
        name: of this one.
    """

    _may_stop = False

    def __init__(self, overall: Overall, name: str) -> None:
        self._overall = overall
        self._name = name

    def on_step(self, state: RunState) -> None:
        """Show how far the run is."""
        self._overall.now(f"{self._name} at {state.step}/{state.iterations} it")
