"""Gaussian noise on each worker's gradient, for privacy."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from metamom.bias.coordinates import Coordinates
from metamom.bias.draws import Draws
from metamom.bias.spelling import Row, spelled
from metamom.common.checks import check_number
from metamom.common.numbers import short


def gaussian(uniform: Tensor, count: int) -> Tensor:
    """Standard normal numbers ``[n, count]`` from uniform ones ``[n, 2 ceil(count/2)]`` on [0, 1) (Box-Muller)."""
    half = uniform.shape[-1] // 2
    radius = (-2 * torch.log1p(-uniform[..., :half])).sqrt()
    angle = 2 * math.pi * uniform[..., half:]
    return torch.cat([radius * angle.cos(), radius * angle.sin()], -1)[..., :count]


@spelled(
    "noise",
    "Gaussian noise of deviation SIGMA",
    Row("`clip:1+noise:0.1`", "`Compose(Clip(1.0), GaussianNoise(0.1))`", "unbiased noise, σ²d a message", "4d"),
    argument="SIGMA",
    number=float,
    options=("seed",),
)
class GaussianNoise(Draws):
    """Add noise ``N(0, sigma^2 I)`` to each worker's gradient; after clipping, the Gaussian mechanism.

    `metamom.bias.privacy_spent` says how private the messages are.

    Args:
        sigma: standard deviation of each entry, > 0 and finite.
        seed: seed of the workers' counter-based draws. Whoever knows it can subtract the noise: for privacy, keep it
            secret, or pass a generator.
        generator: draw from this generator instead, in the order of calls; its state is saved with a run.

    Raises:
        ValueError: for sigma out of range.

    Example:
        >>> out = GaussianNoise(0.5)(torch.zeros(10_000))
        >>> round(float(out.std()), 1)
        0.5

    Reference:
        Dwork, Roth, "The Algorithmic Foundations of Differential Privacy", 2014, appendix A.
    """

    def __init__(self, sigma: float, *, seed: int = 0, generator: torch.Generator | None = None) -> None:
        check_number("GaussianNoise's sigma", sigma)
        if not 0 < sigma < math.inf:
            raise ValueError(f"GaussianNoise needs a standard deviation sigma > 0 and finite; got {sigma}.")
        self.sigma = float(sigma)
        self._seeded(seed, generator)

    def _apply(self, rows: Tensor, at: Coordinates) -> Tensor:
        n, d = rows.shape
        noise = self.sigma * gaussian(self._uniforms(at, n, d + d % 2, rows.device), d)
        return self._in_range((rows.double() + noise).to(rows.dtype))

    @property
    def remedy(self) -> str:
        """See `BiasOperator.remedy`."""
        return "less noise"

    @property
    def spec(self) -> str:
        """``noise:SIGMA``, then ``:seed=N``."""
        return ":".join([f"noise:{short(self.sigma)}", *self._seed_word])
