"""The geometric median."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from metamom.server.rules.base import START, Memory, Rule, rule
from metamom.server.rules.distances import norms, widened
from metamom.server.rules.entrywise import Median

# Limits of Weiszfeld's iteration, and its tolerance: the step relative to the spread.
ITERATIONS = 1000  # starting close to a vector is slow: seven points in four dimensions needed 200
EVERY = 4  # steps between two extrapolations
TOLERANCE = 1e-9


@rule("geomedian")
@dataclass(frozen=True)
class GeometricMedian(Rule):
    """The point with the smallest sum of distances to the n vectors.

    Reference:
        `geometric_median`; kappa: Allouah et al., "Fixing by mixing", 2023.
    """

    @property
    def spec(self) -> str:
        """``geomedian``."""
        return "geomedian"

    def combine(self, rows: Tensor, memory: Memory = START) -> Tensor:
        """See `Rule.combine`."""
        return geometric_median(rows)

    def kappa(self, n: int, faulty: int) -> float:
        """See `Rule.kappa`: ``4 (1 + f / (n - 2 f))^2``."""
        return 4 * (1 + faulty / (n - 2 * faulty)) ** 2 if 2 * faulty < n else math.inf


def geometric_median(vectors: Tensor) -> Tensor:
    """``argmin_y sum_i ||x_i - y||`` of ``[n, d]``, by Weiszfeld's iteration with Vardi and Zhang's step at a vector.

    Reference:
        Vardi, Zhang, "The multivariate L1-median and associated data depth", 2000.
    """
    x = widened(vectors)
    # a start and a scale that one far outlier cannot move, unlike the mean and the mean distance
    y = Median().combine(x)
    near = max(TOLERANCE, torch.finfo(x.dtype).eps) * norms(x - y).median()
    before: Tensor | None = None
    for number in range(ITERATIONS):
        step = _step(x - y, near)
        leap = _leap(x, y, before, step) if number % EVERY == 0 and before is not None else step
        y, before = y + leap, step if leap is step else None
        if bool(torch.linalg.vector_norm(step) <= near):
            break
    # convergence to one of the vectors is slow: return the nearest vector if it is the median itself
    nearest = x[norms(x - y).argmin()]
    return (y if bool(_step(x - nearest, near).any()) else nearest).to(vectors.dtype)


def _leap(x: Tensor, y: Tensor, before: Tensor, step: Tensor) -> Tensor:
    """Extrapolate all further steps from the rate at which steps shrink, if that gets closer; else take the step.

    Along a valley the iteration is slow: with two pairs of vectors far apart, each step is 0.999 of the last.
    """
    shrinking = float((before @ step) / (before @ before).clamp_min(torch.finfo(step.dtype).tiny))
    if not 0 < shrinking < 1:
        return step
    leap = step / (1 - shrinking)
    nearer = norms(x - (y + leap)).sum() < norms(x - (y + step)).sum()
    return leap if bool(nearer) else step


def _step(away: Tensor, near: Tensor) -> Tensor:
    """The step from a point, given its differences ``[n, d]`` to each vector; zero at the geometric median."""
    distances = norms(away)
    here = distances <= near
    weights = torch.where(here, 0, 1 / distances.clamp_min(torch.finfo(away.dtype).tiny))
    total = weights.sum()
    if not bool(total > 0):
        return torch.zeros_like(away[0])  # all vectors coincide
    pull = weights @ away
    step = pull / total
    if bool(here.any()):  # at a vector: it resists the step by its multiplicity
        strength = torch.linalg.vector_norm(pull)
        step = step * (1 - here.sum() / strength).clamp_min(0) if bool(strength > 0) else 0 * step
    return step
