"""Meta-learning of linear regressions: workers that differ, a composite gradient, and its floor in closed form.

Worker i has tasks ``y = phi^T theta_i``, ``phi ~ N(0, Sigma_i)`` with a diagonal Sigma_i. On fresh batches of m support
and q query points its meta-gradient is ``(I - alpha S) Q (I - alpha S) (x - theta_i)``, S and Q the batches' means of
``phi phi^T``: MAML's "exact" estimator for half the squared error.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from metamom.experiments.leaderboard.problems import DIMENSION, WORKERS, Generators, Problem
from metamom.theory.designs import Gaussian
from metamom.theory.fixed_points import Floor, bias_floor
from metamom.theory.regression import coupled, population


@dataclass(frozen=True)
class Regressions(Problem):
    """See the module. The error is ``||grad f||^2`` of the true meta-objective, relative to the start.

    Args:
        alpha: inner step size.
        m: support points.
        q: query points.
        spread: standard deviation of the entries of theta_i.
    """

    name: str = "regressions"
    title: str = "regressions"
    operator: str = "topk:1%"
    alpha: float = 0.5
    m: int = 10
    q: int = 20
    spread: float = 0.5
    target: float = 0.01
    share: float = 0.5

    @cached_property
    def spectra(self) -> Tensor:
        """The diagonals of the Sigma_i, ``[n, d]``, from 0.1 to 1: each worker's own directions are steep."""
        generator = torch.Generator().manual_seed(1)
        return 0.1 + 0.9 * torch.rand(WORKERS, DIMENSION, generator=generator, dtype=torch.float64) ** 2

    @cached_property
    def thetas(self) -> Tensor:
        """``[n, d]``."""
        generator = torch.Generator().manual_seed(2)
        return self.spread * torch.randn(WORKERS, DIMENSION, generator=generator, dtype=torch.float64)

    @cached_property
    def gains(self) -> Tensor:
        """The diagonals of ``(I - alpha Sigma_i)^2 Sigma_i``, ``[n, d]``."""
        return self.spectra * (1 - self.alpha * self.spectra).square()

    @cached_property
    def start(self) -> Tensor:
        """One away from the optimum in every entry."""
        return (self.gains * self.thetas).mean(0) / self.gains.mean(0) + 1

    def draw(self, generators: Generators) -> Tensor:
        """Points ``[S, n, m + q, d]``."""
        size = (WORKERS, self.m + self.q, DIMENSION)
        drawn = torch.stack([torch.randn(size, generator=g, dtype=torch.float64) for g in generators])
        return drawn * self.spectra.sqrt().unsqueeze(1)

    def gradients(self, x: Tensor, sample: Tensor) -> Tensor:
        """See `Problem.gradients`."""
        support, query = sample[..., : self.m, :], sample[..., self.m :, :]
        delta = x.unsqueeze(-2) - self.thetas
        adapted = delta - self.alpha * _product(support, delta)
        outer = _product(query, adapted)
        return outer - self.alpha * _product(support, outer)

    def error(self, x: Tensor) -> Tensor:
        """``||grad f(x)||^2`` over that of the start."""
        gradient = (self.gains * (x.unsqueeze(-2) - self.thetas)).mean(-2)
        return gradient.square().sum(-1) / self.gains.mean(0).square().sum()

    def floor(self) -> Floor:
        """Where the mean iterate of whole gradients ends, for every beta and stable gamma; ``floor`` is absolute."""
        designs = [Gaussian(torch.diag(spectrum)) for spectrum in self.spectra]
        exact = [population(design, self.alpha) for design in designs]
        return bias_floor(exact, [coupled(design, self.alpha, self.m) for design in designs], self.thetas)


def _product(points: Tensor, vectors: Tensor) -> Tensor:
    """The mean of ``phi phi^T v`` over points ``[S, n, m, d]``, for vectors ``[G, S, n, d]``."""
    values = torch.einsum("snmd,gsnd->gsnm", points, vectors)
    return torch.einsum("snmd,gsnm->gsnd", points, values) / points.shape[-2]
