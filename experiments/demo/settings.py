"""What the demo trains, and the step sizes that its search found."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from metamom.common.checks import check_whole
from metamom.common.schema import as_record
from metamom.experiments.recipes import Recipe

Method = Literal["sgd", "momentum"]
METHODS: dict[Method, str] = {"sgd": "plain meta-SGD", "momentum": "momentum"}
MOST_SEEDS = 1000  # the search has those from there on
FOUND = Path(__file__).with_name("tuned.json")


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        name: its letter.
        title: in tables and figures.
        tasks: of each step; the more, the less noise.
        bias: the operator on each worker's gradient.
        workers: n.
        cap: steps after which a run gives up.
        start: the gamma at which the search begins for plain meta-SGD.
        power: for another beta, it begins at ``start / beta**power``.
        below: the case where momentum is predicted to gain more; ``None`` where it is predicted to be faster.
    """

    name: str
    title: str
    tasks: int
    bias: str
    workers: int
    cap: int
    start: float
    power: float = 0.5
    below: str | None = None


@dataclass(frozen=True)
class Demo:
    """The comparisons, and how they are judged.

    Attributes:
        cases: the comparisons.
        seeds: 0, 1, ..., seeds - 1: of tasks and initial weights, the same for both methods.
        dtype: of the weights.
        inner_lr: alpha, one inner step.
        target: mean squared error after one inner step, on the validation tasks.
        every: steps between validations.
        validation: tasks of a validation.
    """

    cases: tuple[Case, ...] = (
        Case("a", "64 tasks a step", 64, "none", 1, 1500, 0.0884),
        Case("b", "64 tasks a step, Top-K 5 %", 64, "topk:5%", 4, 2000, 0.0884),
        Case("c", "4 tasks a step", 4, "none", 1, 4000, 0.0312, 0.0, below="a"),
    )
    seeds: int = 5
    dtype: str = "float32"
    inner_lr: float = 0.01
    target: float = 1.0
    every: int = 10
    validation: int = 200

    def __post_init__(self) -> None:
        check_whole("seeds (--seeds), of which an interval needs two,", self.seeds, 2, MOST_SEEDS)

    def case(self, name: str) -> Case:
        """The comparison of that letter."""
        return next(case for case in self.cases if case.name == name)


@dataclass(frozen=True)
class Choice:
    """A step size and beta, and the mean steps to the target over the seeds of the search.

    ``steps`` is ``None`` where a seed did not reach the target.
    """

    lr: float
    beta: float
    steps: float | None


@dataclass(frozen=True)
class Tuned:
    """A search's results.

    Attributes:
        command: what made them.
        environment: versions and hardware.
        search: the settings of the search.
        cells: for each case, every gamma and beta that was tried.
        best: for each case and method, the fastest.
    """

    command: str
    environment: dict[str, Any]
    search: dict[str, Any]
    cells: dict[str, tuple[Choice, ...]]
    best: dict[str, dict[str, Choice]]


def tuned(path: Path = FOUND) -> Tuned:
    """Read a search's results; those that come with the package by default."""
    return as_record(Tuned, json.loads(path.read_text(encoding="utf-8")), str(path))


def recipe(demo: Demo, case: Case, lr: float, beta: float, seed: int) -> Recipe:
    """A run as plain values: `metamom train` can repeat it."""
    return Recipe(
        "sinusoid", seed=seed, dtype=demo.dtype, inner_lr=demo.inner_lr, lr=lr, beta=beta, meta_batch=case.tasks,
        workers=case.workers, bias=case.bias,
    )  # fmt: skip
