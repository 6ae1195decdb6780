"""Fit the model's constants to timings: least squares of relative errors, with constants >= 0.

Timings span four orders of magnitude: plain least squares would fit only the longest.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import nnls

from metamom.experiments.scaling.model import Exchange, Line, Link


def line(points: Sequence[tuple[float, float]]) -> Line:
    """Fit ``fixed + each * x`` to ``(x, seconds)``, with both constants >= 0.

    Raises:
        ValueError: for fewer than two different x.
    """
    if len({x for x, _ in points}) < 2:
        raise ValueError(f"a line needs timings at two or more sizes; got {list(points)}.")
    fixed, each = _relative([[1.0, x] for x, _ in points], [y for _, y in points])
    return Line(fixed, each)


def link(timings: Sequence[tuple[Exchange, float]]) -> Link:
    """Fit latency and bandwidth to the costs of collectives and the seconds they took.

    Raises:
        ValueError: if the timings cannot separate the two, or show no bandwidth.
    """
    if len({(each.hops, each.path) for each, _ in timings}) < 2:
        raise ValueError(f"latency and bandwidth need two or more different exchanges; got {list(timings)}.")
    latency, per_byte = _relative([[each.hops, each.path] for each, _ in timings], [y for _, y in timings])
    if per_byte <= 0:
        raise ValueError(
            "the timings do not grow with the bytes, so the bandwidth cannot be estimated. Time larger messages."
        )
    return Link(latency, 1 / per_byte)


def _relative(rows: Sequence[Sequence[float]], seconds: Sequence[float]) -> tuple[float, float]:
    a, y = np.array(rows, dtype=np.float64), np.array(seconds, dtype=np.float64)
    a /= y[:, None]
    scale = np.linalg.norm(a, axis=0)  # hops and bytes differ by six orders of magnitude
    found, _ = nnls(a / scale, np.ones(len(y)))
    first, second = found / scale
    return float(first), float(second)
