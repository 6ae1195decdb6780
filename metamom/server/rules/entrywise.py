"""The mean, and robust means of each entry by itself: median and trimmed mean."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from metamom.common.numbers import counted
from metamom.server.rules.base import START, Memory, Rule, rule
from metamom.server.spelling import Argument, text


@rule("mean")
@dataclass(frozen=True)
class Mean(Rule):
    """The mean, which one faulty worker can move anywhere."""

    @property
    def spec(self) -> str:
        """``mean``."""
        return "mean"

    def combine(self, rows: Tensor, memory: Memory = START) -> Tensor:
        """See `Rule.combine`."""
        return rows.mean(0)

    def kappa(self, n: int, faulty: int) -> float:
        """See `Rule.kappa`: zero without faulty vectors."""
        return math.inf if faulty else 0.0


@rule("median")
@dataclass(frozen=True)
class Median(Rule):
    """The median of each entry, the mean of the middle two if n is even.

    Reference:
        Yin, Chen, Ramchandran, Bartlett, "Byzantine-robust distributed learning", 2018.
    """

    @property
    def spec(self) -> str:
        """``median``."""
        return "median"

    def combine(self, rows: Tensor, memory: Memory = START) -> Tensor:
        """See `Rule.combine`."""
        return sorted_mean(rows, (len(rows) - 1) // 2)

    def kappa(self, n: int, faulty: int) -> float:
        """See `Rule.kappa`: ``2 (n - f) / (n - 2 f)``."""
        return 2 * (n - faulty) / (n - 2 * faulty) if 2 * faulty < n else math.inf


@rule("trimmed", Argument("share", float, "SHARE"))
@dataclass(frozen=True)
class Trimmed(Rule):
    """The mean of each entry without the ``floor(share n)`` smallest and as many largest values.

    Args:
        share: 0 < share < 0.5.

    Raises:
        ValueError: for a share out of range.

    Reference:
        As of `Median`.
    """

    share: float

    def __post_init__(self) -> None:
        if not 0 < self.share < 0.5:
            raise ValueError(f"trimmed needs 0 < SHARE < 0.5; got {self.share}.")

    @property
    def spec(self) -> str:
        """``trimmed:SHARE``."""
        return text("trimmed", self.share)

    def cut(self, n: int) -> int:
        """How many of n values are trimmed on each side."""
        return math.floor(self.share * n * (1 + 1e-12))  # 0.29 * 100 is 28.999999999999996

    def check(self, workers: int) -> None:
        """See `Rule.check`: at least one is trimmed."""
        if self.cut(workers) == 0:
            raise ValueError(
                f"{self.spec} of {counted(workers, 'worker')} leaves out none of them and is the mean: take a larger "
                "share, or more workers."
            )

    def combine(self, rows: Tensor, memory: Memory = START) -> Tensor:
        """See `Rule.combine`."""
        return sorted_mean(rows, self.cut(len(rows)))

    def kappa(self, n: int, faulty: int) -> float:
        """See `Rule.kappa`: ``6 c / (n - 2 c) (1 + c / (n - 2 c))`` with c values trimmed on each side, c >= f."""
        cut = self.cut(n)
        return 6 * cut / (n - 2 * cut) * (1 + cut / (n - 2 * cut)) if faulty <= cut else math.inf


def sorted_mean(rows: Tensor, cut: int) -> Tensor:
    """The mean ``[d]`` of each column of ``[n, d]`` without its ``cut`` smallest and as many largest values."""
    return rows.sort(dim=0).values[cut : len(rows) - cut].mean(0)
