"""The six problems, and how much is run on each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from metamom.experiments.leaderboard.problems import Attacked, Noisy, Problem
from metamom.experiments.leaderboard.regressions import Regressions
from metamom.experiments.leaderboard.sinusoids import Sinusoids

PROBLEMS: Mapping[str, Problem] = {
    each.name: each
    for each in (
        Noisy("none", "no bias", "none", target=0.001),
        Noisy("topk", "Top-K 1 %", "topk:1%", spread=0.1, curves=0.3, target=0.003),
        Noisy("clip", "clipping", "clip:1", spread=0.5, curves=0.3, noise=0.05, target=0.001),
        Regressions(),
        Attacked("attack", "attack", "topk:1%", spread=0.1, curves=0.3, target=0.01),
        Sinusoids(),
    )
}


@dataclass(frozen=True)
class Plan:
    """How a cell (a method on a problem) is measured.

    Attributes:
        lrs: the grid of step sizes, the same for all.
        steps: of every run.
        search_seeds: how many seeds choose the step sizes.
        seeds: how many other seeds measure with them.
        last: the share of the last steps (or of those within the budget) that an error is averaged over.
    """

    lrs: tuple[float, ...] = tuple(2.0**power for power in range(-7, 6))
    steps: int = 500
    search_seeds: int = 3
    seeds: int = 10
    last: float = 0.1

    def on(self, problem: Problem) -> Plan:
        """The plan for a problem that runs a share of the steps."""
        return replace(self, steps=round(problem.share * self.steps))

    def budget(self, d: int) -> int:
        """The bytes that messages of 1 % of d entries take in all steps: 4 of a value, 4 of its index."""
        return 8 * max(1, round(0.01 * d)) * self.steps


FULL = Plan()
QUICK = Plan(lrs=tuple(2.0**power for power in range(-5, 4, 2)), steps=40, search_seeds=2, seeds=3)
