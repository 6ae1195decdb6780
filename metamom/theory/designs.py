"""Distributions of the inputs phi of a linear regression, by the moments that matter: second and fourth.

Legend: ``Sigma = E[phi phi^T]``, ``K(Q) = E[(phi^T Q phi) phi phi^T]`` for symmetric Q, both ``[d, d]`` float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, sin
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from metamom.theory import checks


@runtime_checkable
class Design(Protocol):
    """A distribution of inputs."""

    @property
    def covariance(self) -> Tensor:
        """Sigma, ``[d, d]``."""
        ...

    def fourth(self, Q: Tensor) -> Tensor:
        """K(Q), ``[d, d]``."""
        ...


@dataclass(frozen=True)
class Gaussian:
    """``phi ~ N(0, Sigma)``: ``K(Q) = 2 Sigma Q Sigma + tr(Q Sigma) Sigma`` (Isserlis).

    Args:
        covariance: Sigma, ``[d, d]``, symmetric and positive semi-definite; made float64.

    Raises:
        ValueError: if it is not symmetric.

    Example:
        >>> Gaussian(torch.eye(1)).fourth(torch.eye(1, dtype=torch.float64))
        tensor([[3.]], dtype=torch.float64)
    """

    covariance: Tensor

    def __post_init__(self) -> None:
        sigma = self.covariance.to(torch.float64)
        if sigma.dim() != 2 or sigma.shape[0] != sigma.shape[1] or not torch.allclose(sigma, sigma.T):
            raise ValueError(f"covariance must be a symmetric matrix [d, d]; got shape {tuple(sigma.shape)}.")
        object.__setattr__(self, "covariance", sigma)

    def fourth(self, Q: Tensor) -> Tensor:
        """K(Q)."""
        S = self.covariance
        return 2 * S @ Q @ S + (Q * S).sum() * S


@dataclass(frozen=True)
class Points:
    """Inputs drawn uniformly from N given points.

    Args:
        phi: ``[N, d]``; made float64.

    Raises:
        ValueError: for another shape.

    Example:
        >>> Points(torch.tensor([[1.0], [3.0]])).covariance
        tensor([[5.]], dtype=torch.float64)
    """

    phi: Tensor

    def __post_init__(self) -> None:
        if self.phi.dim() != 2 or len(self.phi) == 0:
            raise ValueError(f"phi must be points [N, d]; got shape {tuple(self.phi.shape)}.")
        object.__setattr__(self, "phi", self.phi.to(torch.float64))

    @property
    def covariance(self) -> Tensor:
        """The mean of ``phi phi^T``."""
        return self.phi.T @ self.phi / len(self.phi)

    def fourth(self, Q: Tensor) -> Tensor:
        """The mean of ``(phi^T Q phi) phi phi^T``."""
        weights = ((self.phi @ Q) * self.phi).sum(-1, keepdim=True)
        return (weights * self.phi).T @ self.phi / len(self.phi)

    def best(self, y: Tensor) -> Tensor:
        """The least-squares theta ``[d]`` for targets ``[N]``."""
        solution: Tensor = torch.linalg.lstsq(self.phi, y.to(torch.float64).unsqueeze(-1)).solution
        return solution[:, 0]

    def skew(self, y: Tensor) -> Tensor:
        """``c = mean of (phi^T Sigma phi) phi (y - phi^T theta)`` ``[d]``, the bias from misspecified labels."""
        residual = y.to(torch.float64) - self.phi @ self.best(y)
        weights = ((self.phi @ self.covariance) * self.phi).sum(-1)
        return (weights * residual) @ self.phi / len(self.phi)


@dataclass(frozen=True)
class Waves:
    """``phi = (sin x, cos x)``, x uniform on an interval: ``A sin(x + p)`` is ``phi^T (A cos p, A sin p)``.

    Args:
        low, high: ends of the interval, ``low < high``.

    Raises:
        ValueError: for an empty interval.

    Example:
        >>> Waves(-5, 5).covariance.diagonal()
        tensor([0.5272, 0.4728], dtype=torch.float64)
    """

    low: float = -5.0
    high: float = 5.0

    def __post_init__(self) -> None:
        checks.finite(low=self.low, high=self.high)
        if not self.low < self.high:
            raise ValueError(f"x must have low < high; got low={self.low!r}, high={self.high!r}.")

    @property
    def covariance(self) -> Tensor:
        """Sigma, ``[2, 2]``."""
        C, S = self._waves(2)
        return torch.tensor([[1 - C, S], [S, 1 + C]], dtype=torch.float64) / 2

    def fourth(self, Q: Tensor) -> Tensor:
        """K(Q), from the means of cos 2x, sin 2x, cos 4x, sin 4x."""
        (C2, S2), (C4, S4) = self._waves(2), self._waves(4)
        s4, c4, s2c2 = 3 / 8 - C2 / 2 + C4 / 8, 3 / 8 + C2 / 2 + C4 / 8, (1 - C4) / 8
        s3c, sc3 = S2 / 4 - S4 / 8, S2 / 4 + S4 / 8
        q11, q12, q22 = float(Q[0, 0]), float(Q[0, 1] + Q[1, 0]), float(Q[1, 1])
        k11 = q11 * s4 + q12 * s3c + q22 * s2c2
        k12 = q11 * s3c + q12 * s2c2 + q22 * sc3
        k22 = q11 * s2c2 + q12 * sc3 + q22 * c4
        return torch.tensor([[k11, k12], [k12, k22]], dtype=torch.float64)

    def _waves(self, k: int) -> tuple[float, float]:
        """The means of cos kx and sin kx."""
        width = k * (self.high - self.low)
        rise = sin(k * self.high) - sin(k * self.low)
        return rise / width, (cos(k * self.low) - cos(k * self.high)) / width
