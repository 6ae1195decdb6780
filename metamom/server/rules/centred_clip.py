"""Centred clipping: the mean of the vectors, each drawn into a ball around the last aggregate."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from metamom.common.checks import check_number
from metamom.server.rules.base import START, Memory, Rule, rule
from metamom.server.rules.distances import norms, widened
from metamom.server.rules.entrywise import Median
from metamom.server.spelling import Argument, text

MOST_ITERATIONS = 10_000


@rule(
    "centred-clip",
    Argument("radius", float, "RADIUS"),
    Argument("iterations", int, "L", needed=False, named=True),
    more=("centered-clip",),
)
@dataclass(frozen=True)
class CentredClip(Rule):
    """``v <- v + 1/n sum_i (x_i - v) min(1, radius / ||x_i - v||)``, some times.

    v starts from the last aggregate, and in the first step from the median of each entry. (The paper starts from zero,
    from which ``radius`` limits the first steps too.) F faulty vectors among n move the result by at most
    ``2 F/n radius`` an iteration.

    Args:
        radius: > 0, in units of the gradient.
        iterations: L >= 1.

    Raises:
        ValueError: for a radius or iterations out of range.

    Reference:
        Karimireddy, He, Jaggi, "Learning from history for Byzantine robust optimization", 2021, arXiv 2012.10333.
    """

    radius: float
    iterations: int = 1
    keeps = True

    def __post_init__(self) -> None:
        check_number("centred-clip's radius", self.radius)
        if not 0 < self.radius < float("inf"):
            raise ValueError(f"centred-clip needs a finite RADIUS > 0; got {self.radius}.")
        if not 1 <= self.iterations <= MOST_ITERATIONS:
            raise ValueError(f"centred-clip needs iterations from 1 to {MOST_ITERATIONS:,}; got {self.iterations}.")

    @property
    def spec(self) -> str:
        """``centred-clip:RADIUS``, with ``:iterations=L`` unless that is 1."""
        return text("centred-clip", self.radius, iterations=None if self.iterations == 1 else self.iterations)

    def combine(self, rows: Tensor, memory: Memory = START) -> Tensor:
        """See `Rule.combine`."""
        x = widened(rows)
        before = memory.previous
        start = Median().combine(x) if before is None else before.to(x)
        return centred_clip(x, start, self.radius, self.iterations).to(rows.dtype)


def centred_clip(rows: Tensor, start: Tensor, radius: float, iterations: int = 1) -> Tensor:
    """``v <- v + 1/n sum_i (x_i - v) min(1, radius / ||x_i - v||)`` from ``start``.

    Args:
        rows: ``[n, d]``.
        start: ``[d]``.
        radius: > 0.
        iterations: >= 1.

    Returns:
        v ``[d]``.
    """
    center = start
    for _ in range(iterations):
        away = rows - center
        center = center + (away * (radius / norms(away).clamp_min(radius)).unsqueeze(1)).mean(0)
    return center
