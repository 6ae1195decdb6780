"""What a page shows: methods, their runs, and the numbers that the runs produced. Needs no plotting library."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from metamom.experiments.families.family import LOSS, Metric

NO_SEED = "–"  # of a result over tasks
Curve = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class SeedRun:
    """One run of a method. Values are raw: an accuracy of 93 % is 0.93.

    Attributes:
        seed: what pairs the run with those of other methods.
        curve: validation, ``(iterations done, value)`` by rising iterations.
        loss: the training loss, ``(iterations done, value)``.
        test: ``(adaptation steps, mean, half-width over the test tasks)``; the half-width may be ``None``.
        diverged: the iteration at which the run diverged, if it did. No mean includes such a run.
        sent: bytes of the workers' messages in the whole run.
        exchanged: bytes sent between processes in the whole run.
        done: iterations done; ``None`` for the last of the curves.
    """

    seed: int | str
    curve: Curve = ()
    loss: Curve = ()
    test: tuple[tuple[int, float, float | None], ...] = ()
    diverged: int | None = None
    sent: int | None = None
    exchanged: int | None = None
    done: int | None = None

    @property
    def iterations(self) -> int:
        """Iterations done; 0 if nothing says how many."""
        if self.done is not None:
            return self.done
        return max((curve[-1][0] for curve in (self.curve, self.loss) if curve), default=0)

    @property
    def final(self) -> float:
        """The last validation; NaN if there is none."""
        return self.curve[-1][1] if self.curve else math.nan

    def tested(self, steps: int) -> tuple[float, float | None] | None:
        """Mean and half-width on the test tasks after so many adaptation steps, if they were measured."""
        return next(((mean, half) for at, mean, half in self.test if at == steps), None)


@dataclass(frozen=True)
class Method:
    """The runs of one method: a line with a band in the figures, a row in the table.

    Attributes:
        label: unique in its section.
        runs: one for each seed.
    """

    label: str
    runs: tuple[SeedRun, ...]

    @property
    def finished(self) -> tuple[SeedRun, ...]:
        """The runs that did not diverge."""
        return tuple(run for run in self.runs if run.diverged is None)

    @property
    def drawn(self) -> tuple[SeedRun, ...]:
        """The runs in learning curves: those that did not diverge, or the only one, as far as it went."""
        return self.runs if len(self.runs) == 1 else self.finished


@dataclass(frozen=True)
class Measured:
    """A difference from the baseline that was measured task by task.

    Attributes:
        label: of the method.
        steps: the adaptation steps of the baseline.
        mean: over the tasks.
        half: the half-width of its 95 % interval.
    """

    label: str
    steps: int
    mean: float
    half: float


@dataclass(frozen=True)
class Section:
    """Methods on the same tasks.

    Attributes:
        title: the heading.
        metric: of validation and test.
        methods: in the order of the figures' colours.
        target: the value of the metric to count iterations to.
        text: a paragraph under the heading.
        baseline: the label of the method that the others are compared with, seed by seed.
        measured: differences from the baseline that take the place of those seed by seed.
        loss: of the training tasks.

    Raises:
        ValueError: for labels that are not unique, and a baseline that is not among them.
    """

    title: str
    metric: Metric
    methods: tuple[Method, ...]
    target: float | None = None
    text: str = ""
    baseline: str | None = None
    measured: tuple[Measured, ...] = ()
    loss: Metric = LOSS

    def __post_init__(self) -> None:
        labels = [method.label for method in self.methods]
        if len(set(labels)) < len(labels):
            raise ValueError(f"the labels of a section's methods must differ; got {', '.join(labels)}.")
        if self.baseline is not None and self.baseline not in labels:
            raise ValueError(f"the baseline must be one of the methods {', '.join(labels)}; got {self.baseline!r}.")

    @property
    def steps(self) -> tuple[int, ...]:
        """The numbers of adaptation steps that any run was tested after."""
        return tuple(sorted({at for method in self.methods for run in method.runs for at, _, _ in run.test}))


class Ended(NamedTuple):
    """How a run ended.

    Attributes:
        name: of its directory.
        seed: of the run.
        iterations: done.
        how: in words.
    """

    name: str
    seed: int | str
    iterations: int
    how: str


@dataclass(frozen=True)
class Page:
    """A whole page.

    Attributes:
        title: of the page.
        sections: one for each set of tasks, or claim.
        summary: paragraphs at the top, such as verdicts.
        environments: of the runs, as `metamom.training.directory.environment` gives them; equal ones are shown once.
        facts: more rows under "What was run": a name, and its value.
        endings: of each run.
    """

    title: str
    sections: tuple[Section, ...]
    summary: tuple[str, ...] = ()
    environments: tuple[Mapping[str, Any], ...] = field(default=())
    facts: tuple[tuple[str, str], ...] = ()
    endings: tuple[Ended, ...] = ()
