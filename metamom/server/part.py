"""Which workers are present in a step, and how they count.

Legend: n workers, m of them present; gradients of length d; worker i counts with weight ``w_i``, which sum to 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from metamom.bias import BiasOperator
from metamom.common.checks import check_number
from metamom.server.robust import RobustMean


def normalised_weights(weights: object, n: int) -> tuple[float, ...] | None:
    """Check the weights of n workers, and scale them to sum 1. Equal ones are ``None``, as is ``None``.

    Raises:
        TypeError: for anything but a sequence of numbers.
        ValueError: unless there are n, all positive and finite.
    """
    if weights is None:
        return None
    if isinstance(weights, str) or not isinstance(weights, Sequence):
        raise TypeError(
            f"worker_weights are positive numbers, one for each worker, such as [1, 2]; got {weights!r:.80}."
        )
    for weight in weights:
        check_number("each of worker_weights", weight)
    given = [float(weight) for weight in weights]
    if len(given) != n or not all(0 < weight < math.inf for weight in given):
        raise ValueError(
            f"worker_weights are {n} positive, finite numbers, one for each worker; got {len(given)}: {given!r:.80}."
        )
    if len(set(given)) == 1:
        return None
    total = math.fsum(given)
    return tuple(weight / total for weight in given)


class Part(NamedTuple):
    """Which workers are present in a step, and how they count.

    Attributes:
        n: the number of workers, over all processes.
        present: the present ones, ascending.
        weights: of all workers, sum 1; ``None`` if they are equal.
    """

    n: int
    present: tuple[int, ...]
    weights: tuple[float, ...] | None = None

    @classmethod
    def of(
        cls, n: int, present: Sequence[int] | None, weights: Sequence[float] | None, operator: BiasOperator | None
    ) -> Part:
        """Check both. By default all workers are present, with equal weights.

        Raises:
            TypeError: as `normalised_weights`.
            ValueError: for other weights or workers, or an operator that does not allow absent workers.
        """
        normalised = normalised_weights(weights, n)
        chosen = tuple(range(n)) if present is None else tuple(present)
        if not chosen or list(chosen) != sorted(set(chosen)) or not 0 <= chosen[0] <= chosen[-1] < n:
            raise ValueError(f"present are numbers of the {n} workers, at least one, ascending; got {list(chosen)}.")
        if len(chosen) < n and operator is not None and not operator.allows_absent:
            raise ValueError(
                f"{operator.spec} needs all workers in every step: with absent ones it would be another method. Use "
                "participation=1, or an operator such as ef21:SPEC."
            )
        return cls(n, chosen, normalised)

    @property
    def plain(self) -> bool:
        """Whether all workers are present with equal weights."""
        return len(self.present) == self.n and self.weights is None

    def absent(self, workers: Sequence[int]) -> list[int]:
        """Those of these workers that are not present."""
        return [] if len(self.present) == self.n else [worker for worker in workers if worker not in self.present]

    def averaged(self, operator: BiasOperator | None) -> tuple[int, ...]:
        """The workers that the server averages: all of them if it remembers them, else those present."""
        return tuple(range(self.n)) if remembers(operator) else self.present

    def weighted(self, rows: Tensor, workers: Sequence[int]) -> Tensor:
        """Multiply each worker's row ``[k, d]`` by ``n w_i``."""
        if self.weights is None:
            return rows
        factors = torch.tensor([self.n * self.weights[worker] for worker in workers], dtype=torch.float64)
        return rows * factors.to(rows).unsqueeze(1)


def remembers(operator: BiasOperator | None) -> bool:
    """Whether the server keeps an estimate of each worker's gradient, also while the worker is absent."""
    return operator is not None and operator.remembered is not None


def check_part(part: Part, how: RobustMean, operator: BiasOperator | None) -> None:
    """Refuse weights with a robust mean, a robust mean that trims none of the workers that are averaged, and attacks.

    Raises:
        ValueError: with what to change.
    """
    if part.plain or not how.gathers:
        return
    if how.attack is not None:
        raise ValueError(
            f"attack={how.attack.spec} needs all workers in every step, with equal weights: the last of them attack. "
            "Leave out participation= and worker_weights=, or the attack."
        )
    if part.weights is not None:
        raise ValueError(
            f"worker_weights need aggregate='mean': {how.spec} counts all workers alike. Leave one of them out."
        )
    how.check(len(part.averaged(operator)))
