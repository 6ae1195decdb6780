"""The power of the inner batch size that a bias falls with, fitted on logarithms.

Legend: k sizes m, R draws that the estimates at all sizes have in common.
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
        sizes: the inner batch sizes that were fitted: those where zero bias is excluded.
    """

    exponent: Interval
    scale: float
    sizes: tuple[int, ...]

    @property
    def consistent(self) -> tuple[str, ...]:
        """Which of 1/√m and 1/m the interval covers."""
        return tuple(name for name, rate in RATES.items() if self.exponent.low <= rate <= self.exponent.high)

    @property
    def words(self) -> str:
        """What it is consistent with."""
        value, low, high = self.exponent
        names = self.consistent
        verdict = f"consistent with {' and with '.join(names)}" if names else "consistent with neither 1/√m nor 1/m"
        return f"falls as m^{value:.2f}, interval [{low:.2f}, {high:.2f}]: {verdict}"


def fit_slope(squared: Mapping[int, Jackknife], confidence: float = 0.95) -> Slope | None:
    """The weighted least squares line of ``log ||bias||`` over ``log m``.

    Weights are the inverse variances of ``log ||bias||``. Estimates at different m share their draws, so the interval
    comes from leaving each draw out at all of them at once.

    Args:
        squared: for each m the squared norm of the bias.
        confidence: in (0, 1); of the interval, and of excluding zero.

    Returns:
        ``None`` if zero bias is excluded at fewer than two sizes: then there is nothing to see a slope of.

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
    # a draw that carries so much that without it nothing is left would have no logarithm
    left = torch.stack([s.without.clamp_min(1e-3 * s.value) for s in seen.values()], 1)
    slope, height = _line(x, y.log() / 2, weights)
    without, _ = _line(x, left.log() / 2, weights)
    exponent = Jackknife(float(slope), without).interval(confidence)
    return Slope(exponent, math.exp(float(height)), tuple(seen))


def _line(x: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Slopes and heights at x = 0 of the lines through ``y [..., k]``."""
    center = (weights * x).sum()
    away = weights * (x - center)
    slope = (y @ away) / (away @ (x - center))
    return slope, y @ weights - slope * center
