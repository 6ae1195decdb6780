"""Known constants of an operator's bias (docs/theory/operators.md)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from metamom.bias.checks import check_setting
from metamom.bias.coordinates import Sizes


class Constants(NamedTuple):
    """Bounds on the distance between the mean of the workers' biased gradients and the gradient.

    ``||bias||^2 <= B ||grad f||^2 + b2`` and ``E ||noise||^2 <= M ||grad f||^2 + sigma2``.
    """

    B: float
    b2: float
    M: float
    sigma2: float

    @property
    def floor(self) -> float:
        """``b^2 / (1 - B)``: where the squared gradient norm may stall, whatever the momentum; infinite for B >= 1."""
        return self.b2 / (1 - self.B) if self.B < 1 else float("inf")


class Contraction(ABC):
    """An operator's contraction factor, and the constants that follow from it."""

    @property
    @abstractmethod
    def spec(self) -> str:
        """This operator's SPEC on the command line."""

    @abstractmethod
    def _parts(self, d: int, sizes: Sizes | None) -> list[int]:
        """The lengths of the consecutive parts that the operator acts on."""

    def contraction(self, d: int, sizes: Sizes | None = None) -> float | None:
        """``alpha_c`` with ``E ||C(g) - g||^2 <= (1 - alpha_c) ||g||^2`` for all g ``[d]``; None if there is none."""
        parts = [self._contraction(size) for size in self._parts(d, sizes)]
        return None if None in parts else min(part for part in parts if part is not None)

    def constants(
        self,
        d: int,
        *,
        workers: int = 1,
        zeta2: float = 0.0,
        bound: float | None = None,
        sizes: Sizes | None = None,
    ) -> Constants:
        """The operator's row of the table in docs/theory/operators.md, for full local gradients.

        Args:
            d: length of the gradients, >= 1.
            workers: n >= 1, with independent draws.
            zeta2: heterogeneity >= 0, ``1/n sum ||grad f_i - grad f||^2 <= zeta^2``.
            bound: G >= 0 with ``||grad f_i|| <= G``, which clipping needs.
            sizes: as for a call.

        Raises:
            ValueError: if no such bound is known, and for arguments out of range.
        """
        check_setting(d, workers, zeta2, bound)
        omegas = [self._omega(size) for size in self._parts(d, sizes)]
        if None not in omegas:
            omega = max(omega for omega in omegas if omega is not None) / workers
            return Constants(0.0, 0.0, omega, omega * zeta2)
        alpha = self.contraction(d, sizes)
        if alpha is None:
            raise ValueError(f"no constants are known for {self.spec}: it is neither contractive nor unbiased.")
        return Constants(1 - alpha, (1 - alpha) * zeta2, 0.0, 0.0)

    def _omega(self, d: int) -> float | None:
        """If C is unbiased: the smallest known omega with ``E ||C(g) - g||^2 <= omega ||g||^2`` for all g ``[d]``."""
        return None

    def _contraction(self, d: int) -> float | None:
        """``alpha_c`` for gradients ``[d]``; None if there is none."""
        omega = self._omega(d)
        return 1 - omega if omega is not None and omega < 1 else None


def nearest_loss(codes: Sequence[float], d: int) -> float:
    """The largest ``||C(g) - g||^2 / ||g||^2`` if d entries go to the nearest code, in units of the largest magnitude.

    A gap of half-width h around m has its largest error at m. With d - 1 entries there, next to the largest one, the
    loss is ``(d - 1) h^2 / (1 + (d - 1) m^2)``; no other gradient loses more (docs/theory/operators.md).

    Args:
        codes: increasing, from 0 to 1, two or more.
        d: number of entries, >= 1.

    Example:
        >>> nearest_loss([0.0, 0.5, 1.0], 17)  # all others at 1/4: 16/16 of 1 + 16/16
        0.5
    """
    gaps = [((high - low) / 2, (high + low) / 2) for low, high in pairwise(codes)]
    return max((d - 1) * half**2 / (1 + (d - 1) * middle**2) for half, middle in gaps)


def random_omega(codes: Sequence[float], d: int) -> float:
    """The largest ``E ||C(g) - g||^2 / ||g||^2`` if d entries go to one of the two codes around them, without bias.

    With the codes u < v around an entry x its variance is ``(x - u)(v - x)``. The largest omega is ``mu - 1``, with mu
    the largest root of ``mu^2 + mu ((d - 1) u v - 1) = (d - 1) (u + v)^2 / 4`` of any gap (docs/theory/operators.md).

    Args:
        codes: increasing, from 0 to 1, two or more.
        d: number of entries, >= 1.

    Example:
        >>> random_omega([0.0, 1.0], 9)  # (sqrt(9) - 1) / 2
        1.0
    """
    roots = []
    for low, high in pairwise(codes):
        half = (1 - (d - 1) * low * high) / 2
        roots.append(half + math.sqrt(half**2 + (d - 1) * (low + high) ** 2 / 4))
    return max(0.0, max(roots) - 1)
