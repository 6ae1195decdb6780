"""The progress of many runs: one bar in a terminal; elsewhere a line when a run ends, and one every 30 seconds."""

from __future__ import annotations

import time

from tqdm import tqdm

from metamom.training.callbacks import Callback, RunState
from metamom.training.log_lines import LogLines

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
