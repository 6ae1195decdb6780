"""Steps to a target for every gamma and beta on many quadratics at once, and the best of SGD and of momentum."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from metamom.experiments.when.transient import moments

BETAS = (1.0, 0.7, 0.5, 0.3, 0.2, 0.1, 0.05, 0.02)
# gamma L, the same for both sides: in thirds of powers of two, with 95 % of SGD's limit of 2 among them
STEPS = tuple(1.9 * 2 ** (power / 3) for power in range(-27, 19))
CHECK_EVERY = 32


class Spectrum(NamedTuple):
    """The properties that a group of quadratics shares, ``[d]`` each; the scale is free, so that L = 1.

    Attributes:
        curvatures: lam.
        start: squared entries of the first gradient; they add up to 1.
        noise: the noise's variances on the axes; scaled by each quadratic's own number, and add up to 1.
    """

    curvatures: Tensor
    start: Tensor
    noise: Tensor

    @property
    def noise_curvature(self) -> float:
        """``sum lam_j sigma_j^2`` for noise of total variance 1."""
        return float((self.curvatures * self.noise).sum())


class Quadratics(NamedTuple):
    """M targets, with the bias and noise of each, ``[M]`` each.

    Attributes:
        target: eps, of ``E ||grad f||^2``; the first one is 1.
        bias: ``||b||^2`` of a constant bias, spread evenly over the axes, of random signs (over which means are taken).
        noise: sigma^2/n, the total variance of the mean of n workers' gradients.
    """

    target: Tensor
    bias: Tensor
    noise: Tensor

    def room(self, spectrum: Spectrum) -> Tensor:
        """The rule's number ``R = 2 L (eps - b^2) n / sum_j lam_j sigma_j^2``: gamma L where noise takes the rest."""
        return 2 * (self.target - self.bias) / (self.noise * spectrum.noise_curvature)


class Best(NamedTuple):
    """A method's fastest choices, ``[M]`` each: steps (infinite if it never arrives), and their gamma L and beta."""

    steps: Tensor
    lr: Tensor
    beta: Tensor


class Found(NamedTuple):
    """The fastest of SGD (beta = 1) and of momentum (beta < 1)."""

    sgd: Best
    momentum: Best

    @property
    def speedup(self) -> Tensor:
        """SGD's steps divided by momentum's, ``[M]``."""
        return self.sgd.steps / self.momentum.steps


def errors(spectrum: Spectrum, quadratics: Quadratics, at: tuple[Tensor, Tensor, Tensor], turn: float) -> Tensor:
    """``E ||grad f||^2``, ``[M, gammas, betas]``, from the sums over the axes of start, bias and noise."""
    start, bias, noise = at
    m = quadratics
    return start + m.bias[:, None, None] * bias / (1 + turn**2) + m.noise[:, None, None] * noise


def search(
    spectrum: Spectrum,
    quadratics: Quadratics,
    *,
    lrs: tuple[float, ...] = STEPS,
    betas: tuple[float, ...] = BETAS,
    turn: float = 0.0,
    cap: int = 30_000,
) -> Tensor:
    """The first step after which ``E ||grad f||^2`` is at most the target and stays there, ``[M, gammas, betas]``.

    "Stays": until twice the steps that the slower method's best takes; steps are counted up to ``cap``, and infinite
    beyond.
    """
    gamma, beta = torch.tensor(lrs, dtype=torch.float64)[:, None, None], torch.tensor(betas, dtype=torch.float64)
    one = torch.tensor([value == 1 for value in betas])
    since = torch.zeros(len(quadratics.target), len(lrs), len(betas), dtype=torch.float64)
    target = quadratics.target[:, None, None]
    for k, now in enumerate(moments(gamma * spectrum.curvatures, beta[:, None], turn)):
        at = (
            (spectrum.start * now.left.abs().square()).sum(-1),
            (1 - now.left).abs().square().mean(-1),
            (spectrum.noise * now.variance).sum(-1),
        )
        above = ~(errors(spectrum, quadratics, at, turn) <= target)  # a NaN, after divergence, counts as above
        since.masked_fill_(above, k + 1)
        if k % CHECK_EVERY == 0:
            arrived = since.masked_fill(above, math.inf)
            slower = torch.maximum(*(arrived[:, :, side].amin((1, 2)) for side in (one, ~one))).max()
            if k >= min(2 * float(slower), cap):
                break
    return arrived


def best(steps: Tensor, lrs: tuple[float, ...] = STEPS, betas: tuple[float, ...] = BETAS) -> Found:
    """Each side's fastest, from `search`'s result."""
    sides = []
    for wanted in (True, False):
        columns = [j for j, value in enumerate(betas) if (value == 1) == wanted]
        flat = steps[:, :, columns].flatten(1)
        fewest, where = flat.min(1)
        beta = torch.tensor([betas[j] for j in columns], dtype=torch.float64)[where % len(columns)]
        lr = torch.tensor(lrs, dtype=torch.float64)[where // len(columns)]
        sides.append(Best(fewest, lr, beta))
    return Found(*sides)
