"""The numbers of a page: means over seeds with intervals, paired differences, iterations to a target."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from metamom.common.intervals import student_halfwidth
from metamom.experiments.families.family import Metric
from metamom.experiments.report.contents import Curve, Method, Section, SeedRun

POINTS = 300  # of a curve, at most
BLOCKS = 100  # of iterations that the training loss is averaged over, at most: it is noisy


class Estimate(NamedTuple):
    """A mean over seeds and the half-width of its 95 % interval; ``None`` where there is no interval."""

    mean: float
    half: float | None

    @property
    def low(self) -> float:
        """The lower end; the mean itself where there is no interval."""
        return self.mean - (self.half or 0.0)

    @property
    def high(self) -> float:
        """The upper end."""
        return self.mean + (self.half or 0.0)

    def within(self, metric: Metric) -> tuple[float, float]:
        """Both ends, cut off at the bounds of the metric: for figures of its values, not of differences."""
        return metric.within(self.low, self.high)


class Pairs(NamedTuple):
    """A method's differences from the baseline on the same seeds.

    Attributes:
        label: of the method.
        steps: of adaptation; ``None`` for differences of the last validation.
        by_seed: ``(seed, difference)``.
        estimate: their mean, with Student's interval.
        left_out: seeds without a pair: one of the two runs diverged, or is missing.
    """

    label: str
    steps: int | None
    by_seed: tuple[tuple[int | str, float], ...]
    estimate: Estimate
    left_out: int


def over_seeds(values: Sequence[float]) -> Estimate | None:
    """Mean and Student's 95 % interval of one value for each seed; ``None`` of no values."""
    finite = [value for value in values if math.isfinite(value)]
    return _estimates(np.array(finite)[:, None])[0] if finite else None


def _estimates(values: npt.NDArray[np.float64]) -> list[Estimate]:
    """Means over the first axis of ``[seeds, points]`` with their intervals."""
    seeds = len(values)
    means = values.mean(0).tolist()
    if seeds < 2:
        return [Estimate(mean, None) for mean in means]
    halves = _quantile(seeds) * values.std(0, ddof=1) / math.sqrt(seeds)
    return [Estimate(mean, half) for mean, half in zip(means, halves.tolist(), strict=True)]


@cache
def _quantile(seeds: int) -> float:
    """Half of Student's interval in standard errors: computed once, since a curve has hundreds of intervals."""
    return student_halfwidth([float(i) for i in range(seeds)]) / float(np.std(range(seeds), ddof=1) / math.sqrt(seeds))


def averaged(curve: Curve, width: int) -> Curve:
    """Means over blocks of ``width`` iterations, each at the last iteration that it holds."""
    if width <= 1:
        return curve
    blocks: dict[int, list[tuple[int, float]]] = {}
    for at, value in curve:
        blocks.setdefault((at - 1) // width, []).append((at, value))
    return tuple((points[-1][0], float(np.mean([value for _, value in points]))) for points in blocks.values())


def mean_curve(curves: Sequence[Curve], most: int = POINTS) -> list[tuple[int, Estimate]]:
    """The mean over the curves that have points, at the iterations that all of these have, ``most`` of them."""
    found = [{at: value for at, value in curve if math.isfinite(value)} for curve in curves]
    found = [each for each in found if each]
    if not found:
        return []
    common = [at for at in found[0] if all(at in each for each in found)]
    stride = math.ceil(len(common) / most)
    kept = [at for number, at in enumerate(common) if (len(common) - 1 - number) % max(1, stride) == 0]
    values = np.array([[each[at] for at in kept] for each in found])
    return list(zip(kept, _estimates(values), strict=True)) if kept else []


def validation(method: Method, most: int = POINTS) -> list[tuple[int, Estimate]]:
    """The learning curve of a method, over the seeds that did not diverge."""
    return mean_curve([run.curve for run in method.drawn], most)


def training_loss(method: Method, most: int = POINTS) -> list[tuple[int, Estimate]]:
    """The training loss of a method, averaged over blocks of iterations where it is long."""
    longest = max((run.loss[-1][0] for run in method.drawn if run.loss), default=0)
    return mean_curve([averaged(run.loss, math.ceil(longest / min(most, BLOCKS))) for run in method.drawn], most)


def tested(method: Method, steps: int) -> Estimate | None:
    """The test result after so many adaptation steps: over seeds, or of a method's only run, over its test tasks."""
    results = [result for run in method.finished if (result := run.tested(steps)) is not None]
    if len(method.runs) == 1 and results:
        return Estimate(*results[0])
    return over_seeds([mean for mean, _ in results])


def to_target(section: Section, method: Method) -> list[int]:
    """The first iteration at which each seed's validation reached the target; seeds that never did are not in it."""
    if section.target is None:
        return []
    reached = (
        next((at for at, value in run.curve if section.metric.reached(value, section.target)), None)
        for run in method.runs
    )
    return [at for at in reached if at is not None]


def differences(section: Section) -> list[Pairs]:
    """Every method minus the baseline, on the same seeds: of the test results, or of the last validation."""
    if section.measured:
        return [Pairs(each.label, each.steps, (), Estimate(each.mean, each.half), 0) for each in section.measured]
    plain = next((method for method in section.methods if method.label == section.baseline), None)
    if plain is None:
        return []
    found = []
    for method in section.methods:
        if method is plain:
            continue
        for steps in section.steps or (None,):
            pairs = _pairs(method, plain, steps)
            if pairs is not None:
                found.append(pairs)
    return found


def _pairs(method: Method, plain: Method, steps: int | None) -> Pairs | None:
    ours, theirs = ({run.seed: _result(run, steps) for run in each.finished} for each in (method, plain))
    gaps = tuple((seed, value - theirs[seed]) for seed, value in ours.items() if seed in theirs)
    gaps = tuple((seed, gap) for seed, gap in gaps if math.isfinite(gap))
    estimate = over_seeds([gap for _, gap in gaps])
    seeds = {run.seed for each in (method, plain) for run in each.runs}
    return None if estimate is None else Pairs(method.label, steps, gaps, estimate, len(seeds) - len(gaps))


def _result(run: SeedRun, steps: int | None) -> float:
    if steps is None:
        return run.final
    result = run.tested(steps)
    return math.nan if result is None else result[0]
