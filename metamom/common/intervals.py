"""Unbiased squared norms and variances of means, with jackknife intervals.

Legend: R independent draws of a vector of d entries.

The squared norm of a mean of R draws is too large by (their variance)/R, which matters most if the true norm is small.
The mean of the products of *different* draws is unbiased: ``U = sum_{i != j} <x_i, x_j> / (R (R - 1))``. It can be
negative if the mean is zero. Both estimates here are U-statistics. Each comes with its leave-one-out values, which give
intervals for it and for anything computed from several estimates.

Student's interval is SciPy's. The jackknife is written here: SciPy has none, and a generic one would compute each
estimate R times, where these sums over pairs give all leave-one-out values at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

from torch import Tensor


class Interval(NamedTuple):
    """An estimate and its confidence interval ``low <= value <= high``.

    For a nonnegative quantity the ends are nonnegative, although an unbiased estimate may be: then ``value < low = 0``.
    """

    value: float
    low: float
    high: float

    @property
    def covers_zero(self) -> bool:
        """Whether zero cannot be excluded."""
        return self.low <= 0 <= self.high


class Jackknife(NamedTuple):
    """An estimate, its leave-one-out values ``[R]``, and a lower bound of the quantity that it estimates."""

    value: float
    without: Tensor
    least: float = -math.inf

    @property
    def error(self) -> float:
        """The standard error. For a degenerate U-statistic (a mean of zero) it is too large by up to √2."""
        r = len(self.without)
        return math.sqrt((r - 1) / r * float((self.without - self.without.mean()).square().sum()))

    def interval(self, confidence: float = 0.95) -> Interval:
        """The normal interval, cut off at the lower bound."""
        half = normal_halfwidth(self.error, confidence)
        return Interval(self.value, *(max(self.least, self.value + side * half) for side in (-1, 1)))


def normal_halfwidth(error: float, confidence: float = 0.95) -> float:
    """Half the normal interval of an estimate with this standard error: 1.96 of it for 95 %."""
    return NormalDist().inv_cdf((1 + confidence) / 2) * error  # the standard library's: SciPy is slow to import


def standard_error(values: Tensor) -> Tensor:
    """The standard error of a mean over the first axis, ``[n, ...] -> [...]``; n >= 2."""
    return values.std(0) / math.sqrt(len(values))


def student_halfwidth(values: Sequence[float], confidence: float = 0.95) -> float:
    """Half of Student's interval of the mean of a few values, such as one for each seed.

    Args:
        values: n >= 2 of them.
        confidence: in (0, 1).

    Example:
        >>> round(student_halfwidth([1.0, 3.0]), 4)  # 12.7062 standard errors of 1
        12.7062
    """
    from scipy import stats  # takes a second to import

    return float(stats.t.ppf((1 + confidence) / 2, len(values) - 1) * stats.sem(values))


def squared_norm(rows: Tensor) -> Jackknife:
    """The squared norm of the mean of a distribution, unbiased: the mean of ``<x_i, x_j>`` over i != j.

    Args:
        rows: ``[R, d]``, R >= 3 independent draws.

    Returns:
        A `Jackknife`; its value can be negative if the mean is zero.

    Raises:
        ValueError: for fewer than 3 draws.

    Example:
        >>> import torch
        >>> squared_norm(torch.tensor([[3.0], [1.0], [-1.0]])).value  # (3·1 - 3·1 - 1·1) / 3
        -0.3333333333333333

    Reference:
        Hoeffding, "A class of statistics with asymptotically normal distribution" (1948); the jackknife: Arvesen,
        "Jackknifing U-statistics" (1969).
    """
    r = _draws(rows)
    rows = rows.double()
    own = rows.square().sum(1)
    with_others = rows @ rows.sum(0) - own  # each row's products with all others
    pairs = float(with_others.sum())
    return Jackknife(pairs / (r * (r - 1)), (pairs - 2 * with_others) / ((r - 1) * (r - 2)), least=0.0)


def total_variance(rows: Tensor) -> Jackknife:
    """The trace of the covariance of a distribution, unbiased.

    Args:
        rows: ``[R, d]``, R >= 3 independent draws.

    Raises:
        ValueError: for fewer than 3 draws.

    Example:
        >>> import torch
        >>> total_variance(torch.tensor([[3.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])).value
        4.0
    """
    r = _draws(rows)
    rows = rows.double()
    away = (rows - rows.mean(0)).square().sum(1)
    total = float(away.sum())
    return Jackknife(total / (r - 1), (total - r / (r - 1) * away) / (r - 2), least=0.0)


def norm(squared: Interval) -> Interval:
    """Convert the interval of a squared norm to that of the norm. Negative ends become zero."""
    return Interval(*(math.sqrt(max(0.0, end)) for end in squared))


def _draws(rows: Tensor) -> int:
    if rows.dim() != 2 or len(rows) < 3:
        raise ValueError(f"an interval needs draws [R, d] with R >= 3; got shape {list(rows.shape)}.")
    return len(rows)
