"""Fit the power law with which a bias decreases in the inner batch size, on a log-log scale.

Legend: k sizes m, R draws shared by the estimates at all sizes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from metamom.common.intervals import Interval, Jackknife

RATES = {"1/√m": -0.5, "1/m": -1.0}


class Slope(NamedTuple):
    """``||bias|| ≈ scale · m^exponent``.

    Attributes:
        exponent: with its interval.
        scale: > 0, the fitted norm at m = 1.
        sizes: the inner batch sizes in the fit: those at which zero bias is excluded.
    """

    exponent: Interval
    scale: float
    sizes: tuple[int, ...]

    @property
    def consistent(self) -> tuple[str, ...]:
        """Which of the laws 1/√m and 1/m the interval covers."""
        return tuple(name for name, rate in RATES.items() if self.exponent.low <= rate <= self.exponent.high)

    @property
    def words(self) -> str:
        """The laws that it is consistent with, in words."""
        value, low, high = self.exponent
        names = self.consistent
        verdict = f"consistent with {' and with '.join(names)}" if names else "consistent with neither 1/√m nor 1/m"
        return f"falls as m^{value:.2f}, interval [{low:.2f}, {high:.2f}]: {verdict}"


def fit_slope(squared: Mapping[int, Jackknife], confidence: float = 0.95) -> Slope | None:
    """Fit ``log ||bias||`` over ``log m`` by weighted least squares.

    Weights are the inverse variances of ``log ||bias||``. Estimates at different m share their draws, so the jackknife
    interval leaves each draw out at all m at once.

    Args:
        squared: the squared norm of the bias for each m.
        confidence: level of the interval, and for excluding zero, in (0, 1).

    Returns:
        The slope; ``None`` if zero bias is excluded at fewer than two sizes.

    Example:
        >>> exact = {m: Jackknife(m**-2.0, torch.full((9,), m**-2.0).double()) for m in (1, 2, 4)}
        >>> round(fit_slope(exact).exponent.value, 6)
        -1.0
    """
    seen = {m: s for m, s in sorted(squared.items()) if s.interval(confidence).low > 0}
    if len(seen) < 2:
        return None
    x = torch.tensor([math.log(m) for m in seen], dtype=torch.float64)
    errors = torch.tensor([s.error / (2 * s.value) for s in seen.values()], dtype=torch.float64)
    weights = 1 / errors.clamp_min(1e-9).square()
    weights = weights / weights.sum()
    y = torch.tensor([[s.value for s in seen.values()]], dtype=torch.float64)
    # avoid the logarithm of a value <= 0 if leaving out one influential draw leaves no bias
    left = torch.stack([s.without.clamp_min(1e-3 * s.value) for s in seen.values()], 1)
    slope, height = _line(x, y.log() / 2, weights)
    without, _ = _line(x, left.log() / 2, weights)
    exponent = Jackknife(float(slope), without).interval(confidence)
    return Slope(exponent, math.exp(float(height)), tuple(seen))


def _line(x: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Slopes and intercepts of the lines through ``y [..., k]``."""
    center = (weights * x).sum()
    away = weights * (x - center)
    slope = (y @ away) / (away @ (x - center))
    return slope, y @ weights - slope * center
