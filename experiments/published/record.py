"""A published recipe as a record: settings with their sources, and the figures of its paper. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

Budget = Literal["short", "published"]
BUDGETS: tuple[Budget, ...] = ("short", "published")


class Row(NamedTuple):
    """A column of the papers' tables: N-way K-shot tasks.

    Attributes:
        ways: classes of a task.
        shots: support images of a class.
    """

    ways: int
    shots: int


ROWS = {"5w1s": Row(5, 1), "5w5s": Row(5, 5), "20w1s": Row(20, 1), "20w5s": Row(20, 5)}

WITHIN_ALPHABET = (5,)  # ways of rows that are also tested within alphabets: the test characters have one so large


class Setting(NamedTuple):
    """A value and where it comes from: a place in a paper or its code, or why we chose it."""

    value: Any
    source: str


Settings = Mapping[str, Setting]


class Figure(NamedTuple):
    """A published accuracy in per cent, with the interval that its paper gives; ``None`` if it gives none."""

    mean: float
    halfwidth: float | None = None

    def __str__(self) -> str:
        return f"{self.mean:g}" if self.halfwidth is None else f"{self.mean:g} ± {self.halfwidth:g}"


@dataclass(frozen=True)
class Published:
    """A method as its paper trained and tested it on one kind of tasks.

    Attributes:
        title: of the method.
        paper: where it was published.
        settings: options of a `Recipe`, for all rows.
        iterations: of the published budget.
        meta_batch: tasks an iteration in the published budget, by ways (``None`` for tasks without classes).
        of_ways: further options of a `Recipe`, by ways.
        shares: options of a `Recipe` that are numbers of iterations, as shares of all of them.
        support_passes: what an iteration costs, in passes of each support image, by ways; where it does not say, two
            for each inner step.
        class_passes: what a solver costs beside them, in passes of one image of each class, by ways.
        test_steps: adaptation steps of the published figures, by ways.
        figures: the published accuracies, by row.
        points: published mean squared errors of sinusoids: ``(test shots, adaptation steps, error)``.
        same_shots: whether a network is trained on as many shots as it is tested on; otherwise the settings have the
            shots of training.
    """

    title: str
    paper: str
    settings: Settings
    iterations: Setting
    meta_batch: Mapping[int | None, Setting]
    of_ways: Mapping[int | None, Settings] = field(default_factory=dict)
    shares: Settings = field(default_factory=dict)
    support_passes: Mapping[int | None, int] = field(default_factory=dict)
    class_passes: Mapping[int | None, int] = field(default_factory=dict)
    test_steps: Mapping[int | None, Setting] = field(default_factory=dict)
    figures: Mapping[str, Figure] = field(default_factory=dict)
    points: tuple[tuple[int, int, float], ...] = ()
    same_shots: bool = True

    def options(self, ways: int | None) -> dict[str, Any]:
        """The options of a `Recipe` for tasks of so many classes, without the meta-batch."""
        return {name: setting.value for name, setting in {**self.settings, **self.of_ways.get(ways, {})}.items()}

    def sources(self, ways: int | None) -> dict[str, str]:
        """Where each value comes from, by its name."""
        found = {**self.settings, **self.of_ways.get(ways, {}), **self.shares, "iterations": self.iterations}
        found |= {"meta_batch": self.meta_batch[ways]}
        if ways in self.test_steps:
            found["test_steps"] = self.test_steps[ways]
        return {name: setting.source for name, setting in found.items()}
