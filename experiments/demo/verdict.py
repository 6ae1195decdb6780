"""What the runs say: the ratio of steps to the target, its interval over the seeds, and a verdict."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Literal, NamedTuple

from metamom.common.intervals import Interval, student_halfwidth

Verdict = Literal["above", "below", "unclear"]


class Ratio(NamedTuple):
    """A ratio that has one value for each seed.

    Attributes:
        mean: geometric mean over the seeds, and its 95 % interval; NaN with fewer than two seeds that have a value.
        logs: the logarithm of each seed's value; NaN where there is none.
    """

    mean: Interval
    logs: tuple[float, ...]

    @property
    def verdict(self) -> Verdict:
        """Where the ratio is, if its interval excludes 1."""
        return "above" if self.mean.low > 1 else "below" if self.mean.high < 1 else "unclear"

    def __str__(self) -> str:
        if math.isnan(self.mean.value):
            return "unknown, since too few seeds reached the target"
        return f"{self.mean.value:.2f}, 95 % interval {self.mean.low:.2f} to {self.mean.high:.2f}"


def gain(sgd: Sequence[int | None], momentum: Sequence[int | None], cap: int) -> Ratio:
    """Steps of plain meta-SGD divided by steps of momentum, seed by seed: both have the same tasks and initial weights.

    A run that did not reach the target counts as ``cap`` steps, so that the difference is at least what the ratio says.
    A seed where neither method did has no value.

    Args:
        sgd: steps of plain meta-SGD to the target, ``None`` where it did not reach it.
        momentum: of momentum, in the order of the same seeds.
        cap: the most steps of a run.
    """
    return _ratio(
        math.nan if a is None and b is None else math.log((a or cap) / (b or cap))
        for a, b in zip(sgd, momentum, strict=True)
    )


def quotient(one: Ratio, other: Ratio) -> Ratio:
    """One gain divided by another, seed by seed."""
    return _ratio(a - b for a, b in zip(one.logs, other.logs, strict=True))


def _ratio(values: Iterable[float]) -> Ratio:
    logs = tuple(values)
    known = [value for value in logs if not math.isnan(value)]
    if len(known) < 2:
        return Ratio(Interval(math.nan, math.nan, math.nan), logs)
    mean, half = fmean(known), student_halfwidth(known)
    return Ratio(Interval(*(math.exp(mean + side * half) for side in (0, -1, 1))), logs)
