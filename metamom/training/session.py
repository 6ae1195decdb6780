"""Everything around the steps of a run: resuming, metrics, checkpoints, signals and progress."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, Protocol

from tqdm import tqdm

from metamom.evaluation import Evaluation
from metamom.training.callbacks import Callbacks
from metamom.training.directory import RunDirectory
from metamom.training.ending import recorder
from metamom.training.interrupts import Interrupts, TrainingInterrupted
from metamom.training.log_lines import LogLines
from metamom.training.progress import DivergedError, Progress


class Store(Protocol):
    """The storage of a run's state."""

    def save(self, progress: Progress, is_best: bool = False) -> None:
        """Write a checkpoint after ``progress.done`` steps."""


class Session:
    """Iterates over the remaining steps of a run; a context manager.

    Each step ends with `finish`, which logs it, saves a checkpoint if one is due, and stops the run after a signal.

    Args:
        progress: the run's progress so far; at 0 steps, a checkpoint is written at once.
        total: total number of steps.
        store: writes checkpoints.
        run: the directory for metrics and the ending, held until the session ends; ``None`` for none.
        path: of that directory, for messages; ``None`` if nothing is saved.
        label: label of the progress.
        unit: unit of the steps: ``"it"``, ``"epoch"``.
        hidden: show no progress; ``None`` shows a bar in a terminal, and prints lines elsewhere.
        due: whether to save, given the steps and seconds of work since the last checkpoint.
        remedies: advice after divergence, see `DivergedError`.
        callbacks: called after each step; they may end the run.

    Attributes:
        progress: the current progress of the run.
        interrupts: the signals received.
        stop: the signal that ends the run after this step, or 0; several processes decide it together.
    """

    def __init__(
        self,
        progress: Progress,
        total: int,
        store: Store,
        *,
        run: RunDirectory | None,
        path: str | Path | None,
        label: str,
        unit: str,
        hidden: Literal[True] | None,
        due: Callable[[int, float], bool],
        remedies: str | None = None,
        callbacks: Callbacks | None = None,
    ) -> None:
        self.progress = progress
        self.total = total
        self.store = store
        self.run = run
        self.path = path
        self.due = due
        self.remedies = remedies
        self.callbacks = callbacks
        self.interrupts = Interrupts()
        self.stop: Callable[[], int] = lambda: self.interrupts.caught or 0
        self._bar = tqdm(total=total, initial=progress.done, desc=label, unit=unit, disable=hidden)
        self._lines = LogLines(label, total, unit) if hidden is None and self._bar.disable else None
        self._unit = {"it": "step"}.get(unit, unit)
        self._began = 0.0
        self._saved = progress.seconds
        self._took: float | None = None
        self._stack = ExitStack()

    @property
    def stopped(self) -> str | None:
        """Why a callback has stopped the run; ``None`` if none has."""
        return None if self.callbacks is None else self.callbacks.reason

    def __enter__(self) -> Session:
        if self.progress.done == 0:
            self.store.save(self.progress)
        if self.run is not None:
            self._stack.push(recorder(self.run, lambda: self.progress.done, lambda: self.stopped))
        self._stack.enter_context(self.interrupts)
        self._stack.enter_context(self._bar)
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.__exit__(*exception)

    def __iter__(self) -> Iterator[int]:
        """Iterate over the numbers of the remaining steps."""
        while self.progress.done < self.total and self.stopped is None:
            self._took = None
            self._began = time.perf_counter()
            yield self.progress.done

    def restart_clock(self) -> None:
        """Restart the step's clock, to leave out time that was not spent on training."""
        self._began = time.perf_counter()

    def stepped(self) -> float:
        """Stop the step's clock and return its seconds. What follows, such as validation, does not count."""
        self._took = time.perf_counter() - self._began
        done, seconds = self.progress.done + 1, self.progress.seconds + self._took
        self.progress = self.progress._replace(done=done, seconds=seconds)
        return self._took

    def finish(
        self,
        line: dict[str, Any],
        shown: Mapping[str, str],
        best: float | None = None,
        validation: Evaluation | None = None,
    ) -> None:
        """End a step after `stepped`.

        Args:
            line: the line for ``metrics.jsonl``; gets ``"seconds"``. One with a ``"validation"`` is shown at once.
            shown: values to show as progress.
            best: the validation, if it is the best so far.
            validation: the validation after this step, if any, for callbacks.

        Raises:
            TrainingInterrupted: after saving, if a signal has been received.
        """
        if best is not None:
            self.progress = self.progress._replace(best=best)
        done, seconds = self.progress.done, self.progress.seconds
        line["seconds"] = seconds
        if self.run is not None:
            self.run.log(line)
        if self.callbacks is not None:
            self.callbacks.after(done, line, validation)
        signal = self.stop()
        self._show(line, shown)
        ends = done == self.total or self.stopped is not None or signal
        if ends or best is not None or self.due(done, seconds - self._saved):
            self.store.save(self.progress, best is not None)
            self._saved = seconds
        if signal:
            kept = f"saved in {self.path}; resume to go on" if self.path else "nothing was saved without a run_dir"
            raise TrainingInterrupted(f"stopped after {self._unit} {done} of {self.total}; {kept}.", signal)

    def _show(self, line: Mapping[str, Any], shown: Mapping[str, str]) -> None:
        """Show the progress, after a completed step."""
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update()
        if self._lines is None:
            return
        shown = {name: text for name, text in shown.items() if not name.endswith("/s")}  # the lines have their own
        value, halfwidth = line.get("validation"), line.get("validation_halfwidth")
        if value is not None:
            shown["validation"] = f"{value:.4f}" + ("" if halfwidth is None else f" ± {halfwidth:.4f}")
        done = self.progress.done
        self._lines.stepped(done, shown, now=value is not None or done == self.total)

    def check_finite(self, values: Mapping[str, float]) -> None:
        """Stop the run if a number is not finite. Values have names for the error: ``{"the loss": loss}``.

        Raises:
            DivergedError: naming the first one that is not finite, and this step.
        """
        for what, value in values.items():
            if not math.isfinite(value):
                raise self.diverged(what)

    def diverged(self, what: str) -> DivergedError:
        """The error for a value that is not finite at this step."""
        remedies = () if self.remedies is None else (self.remedies,)
        return DivergedError(what, self.progress.done, *remedies)
