"""Constants of the model from timings: least squares of relative errors, and no constant below zero.

Timings go over four orders of magnitude: plain least squares would see the longest ones alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import nnls

from metamom.experiments.scaling.model import Exchange, Line, Link


def line(points: Sequence[tuple[float, float]]) -> Line:
    """``fixed + each * x`` through ``(x, seconds)``, both >= 0.

    Raises:
        ValueError: for fewer than two different x.
    """
    if len({x for x, _ in points}) < 2:
        raise ValueError(f"a line needs timings at two sizes or more; got {list(points)}.")
    fixed, each = _relative([[1.0, x] for x, _ in points], [y for _, y in points])
    return Line(fixed, each)


def link(timings: Sequence[tuple[Exchange, float]]) -> Link:
    """Latency and bandwidth through what collectives cost and the seconds that they took.

    Raises:
        ValueError: if the timings cannot tell the two apart, or show no bandwidth.
    """
    if len({(each.hops, each.path) for each, _ in timings}) < 2:
        raise ValueError(f"latency and bandwidth need two different exchanges or more; got {list(timings)}.")
    latency, per_byte = _relative([[each.hops, each.path] for each, _ in timings], [y for _, y in timings])
    if per_byte <= 0:
        raise ValueError("the timings do not grow with the bytes: no bandwidth can be told. Time larger messages.")
    return Link(latency, 1 / per_byte)


def _relative(rows: Sequence[Sequence[float]], seconds: Sequence[float]) -> tuple[float, float]:
    a, y = np.array(rows, dtype=np.float64), np.array(seconds, dtype=np.float64)
    a /= y[:, None]
    scale = np.linalg.norm(a, axis=0)  # hops and bytes differ by six orders of magnitude
    found, _ = nnls(a / scale, np.ones(len(y)))
    first, second = found / scale
    return float(first), float(second)
