"""The problems: many runs ``x [G, S, d]`` at once, G step sizes of S seeds each, and n workers.

A seed draws the same samples for every method and step size.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from metamom.experiments.quadratics import Quadratics

WORKERS, DIMENSION = 5, 100
Generators = Sequence[torch.Generator]  # one for each seed


def sign_flip(rows: Tensor, attackers: int, scale: float) -> Tensor:
    """The last workers send their gradient times ``-scale``, ``[..., n, d]``; the others' rows stay as they are.

    Everything that the leaderboard knows of attacks is here.
    """
    if attackers == 0:
        return rows
    honest = rows.shape[-2] - attackers
    return torch.cat([rows[..., :honest, :], -scale * rows[..., honest:, :]], -2)


class Problem(ABC):
    """What a method runs on.

    Attributes:
        name: on the command line, and of its folder.
        title: in tables.
        operator: A, the operator that messages pass through: ``none``, ``topk:1%`` or ``clip:1``.
        target: the error to reach.
        every: steps between two readings of the error.
        share: of the plan's steps that are run.
        attackers: how many of the workers attack, the last ones.
    """

    name: str
    title: str
    operator: str
    target: float
    every: int = 1
    share: float = 1.0
    attackers: int = 0
    scale: float = 5.0
    workers: int = WORKERS
    unit: ClassVar[float] = 0.001  # tables show errors in these
    sign: ClassVar[str] = ", ‰"

    @property
    def clips(self) -> bool:
        """Whether every message must be clipped."""
        return self.operator.startswith("clip")

    @property
    @abstractmethod
    def start(self) -> Tensor:
        """The weights ``[d]`` that every run starts from."""

    @abstractmethod
    def draw(self, generators: Generators) -> Any:
        """One step's sample for every seed."""

    @abstractmethod
    def gradients(self, x: Tensor, sample: Any) -> Tensor:
        """The workers' gradients at ``x [G, S, d]`` on a sample, ``[G, S, n, d]``."""

    @abstractmethod
    def error(self, x: Tensor) -> Tensor:
        """The error of the honest workers' true objective, ``[G, S]``; 1 at the start unless it is a loss."""

    def messages(self, x: Tensor, sample: Any) -> Tensor:
        """`gradients` with the attack."""
        return sign_flip(self.gradients(x, sample), self.attackers, self.scale)


@dataclass(frozen=True)
class Noisy(Problem):
    """Workers' quadratics ``1/2 (x - c_i)^T diag(a_i) (x - c_i)`` with noise: the error is relative ``||grad f||^2``.

    Args:
        spread: standard deviation of the entries of the minima c_i.
        curves: by how much the curvatures of the workers differ, as a fraction.
        noise: standard deviation of each entry of each worker's gradient.
    """

    name: str
    title: str
    operator: str
    spread: float = 0.0
    curves: float = 0.0
    noise: float = 0.1
    target: float = 0.01
    attackers: int = 0

    @cached_property
    def quadratics(self) -> Quadratics:
        """All workers' functions; curvatures fall from 1 to 1/100."""
        generator = torch.Generator().manual_seed(0)
        mean = torch.logspace(0, math.log10(0.01), DIMENSION, dtype=torch.float64)
        size = (WORKERS, DIMENSION)
        factors = 1 + self.curves * (2 * torch.rand(size, generator=generator, dtype=torch.float64) - 1)
        return Quadratics(mean * factors, self.spread * torch.randn(size, generator=generator, dtype=torch.float64))

    @cached_property
    def honest(self) -> Quadratics:
        """The functions of those who do not attack: f is their mean."""
        return Quadratics(*(each[: WORKERS - self.attackers] for each in self.quadratics))

    @cached_property
    def start(self) -> Tensor:
        """One away from the optimum in every entry."""
        return self.honest.optimum + 1

    def draw(self, generators: Generators) -> Tensor:
        """Noise ``[S, n, d]``."""
        size = (WORKERS, DIMENSION)
        return self.noise * torch.stack([torch.randn(size, generator=g, dtype=torch.float64) for g in generators])

    def gradients(self, x: Tensor, sample: Tensor) -> Tensor:
        """See `Problem.gradients`."""
        return self.quadratics.gradients(x) + sample

    def error(self, x: Tensor) -> Tensor:
        """``||grad f(x)||^2`` over that of the start."""
        f = self.honest
        return (f.curvature * (x - f.optimum)).square().sum(-1) / f.curvature.square().sum()


@dataclass(frozen=True)
class Attacked(Noisy):
    """The same with attackers, whose gradients point away from the optimum."""

    attackers: int = 1
    share: float = 0.5
