"""The squared norm of a mean that is known from noisy draws."""

from __future__ import annotations

import math

from torch import Tensor


def squared_mean(values: Tensor) -> tuple[float, float]:
    """``||E g||^2`` from independent draws ``[n, d]``, without bias, and its 95 % half-width (jackknife).

    The mean of ``<g_i, g_j>`` over pairs i != j: the square of the mean would hold the noise of each draw once.
    """
    n = len(values)
    total, squares = values.sum(0), values.square().sum(1)
    estimate = float((total.square().sum() - squares.sum()) / (n * (n - 1)))
    rest = total - values
    without = (rest.square().sum(1) - (squares.sum() - squares)) / ((n - 1) * (n - 2))
    return estimate, 1.96 * math.sqrt(float((without - without.mean()).square().sum()) * (n - 1) / n)
