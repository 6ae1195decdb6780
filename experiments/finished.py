"""The runs of an interrupted comparison that are finished, as a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from metamom.common.numbers import plural
from metamom.training.interrupts import TrainingInterrupted

if TYPE_CHECKING:
    from metamom.experiments.compare import Comparison, Outcome


class ComparisonInterrupted(TrainingInterrupted):
    """A comparison was stopped by a signal.

    Attributes:
        table: lines with the results of the runs that are finished.
    """

    def __init__(self, message: str, signal_number: int, table: Sequence[str] = ()) -> None:
        super().__init__(message, signal_number)
        self.table = list(table)


def finished_table(comparison: Comparison, outcomes: Sequence[Outcome], total: int) -> list[str]:
    """A line for each finished run: its last validation, and its result on the test tasks."""
    metric, steps = comparison.base.family.metric, max(comparison.steps)
    lines = [f"{len(outcomes)} of {total} runs {plural(len(outcomes), 'is', 'are')} finished"]
    if not outcomes:
        return lines
    width = max(len(each.path.name) for each in outcomes)
    lines.append(f"{'run':<{width}}  validation  test {metric.short} after {steps} steps")
    for each in outcomes:
        last = metric.show(each.curve[-1][1]) if each.curve else "-"
        if each.test is None or each.halfwidth is None:
            result = f"diverged at step {each.diverged}"
        else:
            at = each.steps.index(steps)
            result = metric.with_interval(each.test[at], each.halfwidth[at])
        lines.append(f"{each.path.name:<{width}}  {last:<10}  {result}")
    return lines
