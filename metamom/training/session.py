"""What surrounds the steps of a run: where it goes on from, its record, checkpoints, signals and progress bar."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from metamom.training.directory import RunDirectory
from metamom.training.interrupts import Interrupts, TrainingInterrupted
from metamom.training.progress import DivergedError, Progress


class Store(Protocol):
    """Where the state of a run is kept."""

    def save(self, progress: Progress, is_best: bool = False) -> None:
        """Write a checkpoint after ``progress.done`` steps."""


class Session:
    """The steps that are left of a run, one after the other; a context manager.

    Each step ends with `finish`, which logs it, saves when it is due, and stops the run where a signal has come.

    Args:
        progress: how far the run has come; 0 steps write a checkpoint at once.
        total: number of steps in all.
        store: where checkpoints go.
        run: the directory that metrics go to, held until the session ends; ``None`` for none.
        path: of that directory, for messages; ``None`` where nothing is saved.
        label: in front of the progress bar.
        unit: of its steps: ``"it"``, ``"epoch"``.
        hidden: show no bar; ``None`` shows it in a terminal only.
        due: whether to save after that many steps and seconds of work since the last checkpoint.
        remedies: for divergence, see `DivergedError`.

    Attributes:
        progress: how far the run has come by now.
        interrupts: signals that have come.
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
        hidden: bool | None,
        due: Callable[[int, float], bool],
        remedies: str | None = None,
    ) -> None:
        self.progress = progress
        self.total = total
        self.store = store
        self.run = run
        self.path = path
        self.due = due
        self.remedies = remedies
        self.interrupts = Interrupts()
        self.stop: Callable[[], int] = lambda: self.interrupts.caught or 0
        self._bar = tqdm(total=total, initial=progress.done, desc=label, unit=unit, disable=hidden)
        self._unit = {"it": "step"}.get(unit, unit)
        self._began = 0.0
        self._saved = progress.seconds
        self._took: float | None = None
        self._sinks: list[Callable[[Mapping[str, Any]], None]] = []
        self._stack = ExitStack()

    def log_to(self, sink: Callable[[Mapping[str, Any]], None]) -> None:
        """Give every line of metrics to a function too."""
        self._sinks.append(sink)

    def __enter__(self) -> Session:
        if self.progress.done == 0:
            self.store.save(self.progress)
        self._stack.enter_context(self.interrupts)
        self._stack.enter_context(self._bar)
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.__exit__(*exception)

    def __iter__(self) -> Iterator[int]:
        """The numbers of the steps that are left."""
        while self.progress.done < self.total:
            self._took = None
            self._began = time.perf_counter()
            yield self.progress.done

    def restart_clock(self) -> None:
        """Do not count what has been done of this step so far: it was no training."""
        self._began = time.perf_counter()

    def stepped(self) -> float:
        """The step has been taken; what follows, such as a validation, does not count. Its seconds."""
        self._took = time.perf_counter() - self._began
        done, seconds = self.progress.done + 1, self.progress.seconds + self._took
        self.progress = self.progress._replace(done=done, seconds=seconds)
        return self._took

    def finish(self, line: dict[str, Any], shown: Mapping[str, str], best: float | None = None) -> None:
        """End a step that `stepped`.

        Args:
            line: of ``metrics.jsonl``; gets ``"seconds"``.
            shown: beside the bar.
            best: the validation, where it is the best so far.

        Raises:
            TrainingInterrupted: after saving, where a signal has come.
        """
        if best is not None:
            self.progress = self.progress._replace(best=best)
        done, seconds = self.progress.done, self.progress.seconds
        line["seconds"] = seconds
        if self.run is not None:
            self.run.log(line)
        for sink in self._sinks:
            sink(line)
        stopped = self.stop()
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update()
        if done == self.total or best is not None or stopped or self.due(done, seconds - self._saved):
            self.store.save(self.progress, best is not None)
            self._saved = seconds
        if stopped:
            kept = f"saved in {self.path}; resume to go on" if self.path else "nothing was saved without a run_dir"
            raise TrainingInterrupted(f"stopped after {self._unit} {done} of {self.total}; {kept}.", stopped)

    def check_finite(self, values: Mapping[str, float]) -> None:
        """Stop a run in which a number is not finite, by what each is: ``{"the loss": loss}``.

        Raises:
            DivergedError: naming the first that is not, at this step.
        """
        for what, value in values.items():
            if not math.isfinite(value):
                raise self.diverged(what)

    def diverged(self, what: str) -> DivergedError:
        """The error about something that is not finite at this step."""
        remedies = () if self.remedies is None else (self.remedies,)
        return DivergedError(what, self.progress.done, *remedies)
