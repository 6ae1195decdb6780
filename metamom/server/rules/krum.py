"""Krum and multi-Krum: the vectors whose nearest neighbours are closest."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from metamom.server.rules.base import FAULTY, START, Memory, Rule, check_faulty, rule, too_few
from metamom.server.rules.distances import pairwise
from metamom.server.spelling import Argument, text


@rule("krum", FAULTY)
@dataclass(frozen=True)
class Krum(Rule):
    """The vector with the smallest sum of squared distances to its n - F - 2 nearest others; the first of equal ones.

    Args:
        faulty: F >= 1, the most workers that may be faulty. It needs n >= 2 F + 3 workers.

    Raises:
        ValueError: for F out of range.

    Reference:
        Blanchard, El Mhamdi, Guerraoui, Stainer, "Machine learning with adversaries: Byzantine tolerant gradient
        descent", 2017.
    """

    faulty: int

    def __post_init__(self) -> None:
        check_faulty("krum", self.faulty)

    @property
    def spec(self) -> str:
        """``krum:F``."""
        return text("krum", self.faulty)

    def check(self, workers: int) -> None:
        """See `Rule.check`: ``n >= 2 F + 3``."""
        if workers < 2 * self.faulty + 3:
            raise too_few(f"{self.spec} (2 F + 3)", workers, 2 * self.faulty + 3)

    def combine(self, rows: Tensor, memory: Memory = START) -> Tensor:
        """See `Rule.combine`."""
        self.check(len(rows))
        return rows[int(krum_scores(rows, self.faulty).argmin())].clone()

    def kappa(self, n: int, faulty: int) -> float:
        """See `Rule.kappa`: ``6 (n - F) / (n - 2 F - 1)``, for f <= F."""
        return _kappa(n, self.faulty, faulty)


@rule("multi-krum", FAULTY, Argument("chosen", int, "M", needed=False))
@dataclass(frozen=True)
class MultiKrum(Rule):
    """The mean of the M vectors with the smallest of Krum's sums; the first of equal ones.

    Args:
        faulty: F >= 1, the most workers that may be faulty. It needs n >= 2 F + 3 workers.
        chosen: 1 <= M <= n - F; n - F if ``None``.

    Raises:
        ValueError: for F or M out of range.

    Reference:
        As of `Krum`.
    """

    faulty: int
    chosen: int | None = None

    def __post_init__(self) -> None:
        check_faulty("multi-krum", self.faulty)
        if self.chosen is not None and self.chosen < 1:
            raise ValueError(f"multi-krum averages M >= 1 vectors; got M={self.chosen}.")

    @property
    def spec(self) -> str:
        """``multi-krum:F`` or ``multi-krum:F:M``."""
        return text("multi-krum", self.faulty, *([] if self.chosen is None else [self.chosen]))

    def check(self, workers: int) -> None:
        """See `Rule.check`: ``n >= 2 F + 3`` and ``M <= n - F``."""
        if workers < 2 * self.faulty + 3:
            raise too_few(f"{self.spec} (2 F + 3)", workers, 2 * self.faulty + 3)
        if self.chosen is not None and self.chosen > workers - self.faulty:
            raise ValueError(
                f"{self.spec} would average M={self.chosen} of {workers} workers, so a faulty one: take M <= n - F, "
                f"{workers - self.faulty}."
            )

    def combine(self, rows: Tensor, memory: Memory = START) -> Tensor:
        """See `Rule.combine`."""
        self.check(len(rows))
        count = len(rows) - self.faulty if self.chosen is None else self.chosen
        best = krum_scores(rows, self.faulty).argsort(stable=True)[:count]
        return rows[best.sort().values].mean(0)

    def kappa(self, n: int, faulty: int) -> float:
        """See `Rule.kappa`: that of `Krum`."""
        return _kappa(n, self.faulty, faulty)


def krum_scores(rows: Tensor, faulty: int) -> Tensor:
    """Each vector's sum of squared distances to its n - F - 2 nearest others.

    Args:
        rows: ``[n, d]``.
        faulty: F, at most n - 3.

    Returns:
        ``[n]`` float64, divided by one number for all, so that the smallest are in range.
    """
    near = pairwise(rows).sort(dim=1).values[:, 1 : len(rows) - faulty - 1]  # the nearest is the vector itself
    radius = near[:, -1].min()
    return (near / (radius if bool(radius > 0) else 1)).square().sum(1)


def _kappa(n: int, most: int, faulty: int) -> float:
    return 6 * (n - most) / (n - 2 * most - 1) if faulty <= most and n >= 2 * most + 3 else math.inf
