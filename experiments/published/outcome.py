"""What a run of a published recipe came to, as a record in its run directory: `FILE`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from metamom.common.files import write_atomically
from metamom.common.intervals import normal_halfwidth
from metamom.common.schema import read_record
from metamom.evaluation import Evaluation

FILE = "published.json"
WITHIN = ", within an alphabet"  # ends the name of a measurement on such tasks
DIVERGED = 100.0  # mean squared error of a sinusoid; predictions within the range of the targets, ±5, have less


@dataclass(frozen=True)
class Measurement:
    """One evaluation on test tasks.

    Attributes:
        name: what sets it apart: the statistics that normalise (``"batch"``, ``"support"``), with `WITHIN` on tasks of
            one alphabet; or the ``"5 shots"``.
        steps: numbers of adaptation steps, ``k`` of them.
        mean: over the tasks that did not diverge, ``k`` values: accuracies in [0, 1], or mean squared errors.
        halfwidth: of their 95 % intervals over these tasks.
        tasks: their number, diverged ones among them.
        metric: ``"accuracy"`` or ``"loss"``.
        diverged: tasks with an error above `DIVERGED`, or none that is finite, ``k`` numbers.
        mean_of_all: over all tasks, ``k`` values; ``None`` if it is not finite.
    """

    name: str
    steps: tuple[int, ...]
    mean: tuple[float, ...]
    halfwidth: tuple[float, ...]
    tasks: int
    metric: str
    diverged: tuple[int, ...]
    mean_of_all: tuple[float | None, ...]

    @classmethod
    def of(cls, name: str, result: Evaluation) -> Measurement:
        """What `metamom.evaluate` has measured."""
        means, halfwidths, diverged = [], [], []
        for values in result.values:
            kept = values if result.metric == "accuracy" else values[values <= DIVERGED]  # NaN is not
            diverged.append(len(values) - len(kept))
            means.append(float(kept.mean()))
            error = float(kept.std()) / math.sqrt(max(1, len(kept)))
            halfwidths.append(normal_halfwidth(error, result.confidence))
        every = tuple(mean if math.isfinite(mean) else None for mean in result.mean)
        tasks = result.values.shape[1]
        return cls(name, result.steps, tuple(means), tuple(halfwidths), tasks, result.metric, tuple(diverged), every)

    def at(self, steps: int) -> tuple[float, float]:
        """The mean and the half-width after so many steps."""
        place = self.steps.index(steps)
        return self.mean[place], self.halfwidth[place]


@dataclass(frozen=True)
class Outcome:
    """A finished run of a published recipe.

    Attributes:
        experiment: ``"omniglot"`` or ``"sinusoid"``.
        recipe: its name, as ``--recipe`` takes it.
        row: of Omniglot, such as ``"5w1s"``; ``None`` for sinusoids.
        shots: support points of a training task, a class or task.
        budget: ``"short"`` or ``"published"``.
        optimizer: the outer one: ``"adam"``, ``"sgd"`` (plain meta-SGD, β = 1) or ``"composite"`` (momentum).
        lr: its step size γ.
        seed: of the weights and tasks.
        iterations: the length of the run.
        meta_batch: tasks an iteration.
        checkpoint: the iterations before the checkpoint that was tested, the best by validation.
        minutes: of training, on this machine, with whatever else it did.
        tested: the evaluations.
        sources: where each setting of the recipe comes from, by its name.
        environment: versions, hardware and command.
    """

    experiment: str
    recipe: str
    row: str | None
    shots: int
    budget: str
    optimizer: str
    lr: float
    seed: int
    iterations: int
    meta_batch: int
    checkpoint: int
    minutes: float
    tested: tuple[Measurement, ...]
    sources: dict[str, str] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)

    def named(self, name: str) -> Measurement:
        """The evaluation of this name."""
        return next(each for each in self.tested if each.name == name)


def write(outcome: Outcome, run_dir: str | Path) -> Path:
    """Write the record into the run directory; returns its path."""
    path = Path(run_dir) / FILE
    write_atomically(path, (json.dumps(asdict(outcome), indent=2) + "\n").encode())
    return path


def read_all(*folders: str | Path) -> Iterator[tuple[Path, Outcome]]:
    """The run directories in some folders, at any depth, that have a record, in the order of their paths.

    Raises:
        ValueError: for a folder that does not exist, and a record that cannot be read.
    """
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise ValueError(f"{folder} is not a folder with runs of `metamom reproduce`.")
        for path in sorted(folder.rglob(FILE)):
            yield path.parent, read_record(Outcome, path)
