"""Workers with different quadratics, many momentum runs on them at once, and statistics of their trajectories."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from metamom.bias.base import BiasOperator
from metamom.common.intervals import normal_halfwidth, standard_error
from metamom.optim import CompositeMomentum


class Quadratics(NamedTuple):
    """n workers' ``1/2 (x - c_i)^T diag(a_i) (x - c_i)``: curvatures and minima ``[n, d]``."""

    curvatures: Tensor
    minima: Tensor

    def gradients(self, x: Tensor) -> Tensor:
        """Each worker's gradient at ``x [..., d]``, ``[..., n, d]``."""
        return self.curvatures * (x.unsqueeze(-2) - self.minima)

    @property
    def curvature(self) -> Tensor:
        """The curvatures of the mean, ``[d]``; the largest is its smoothness L."""
        return self.curvatures.mean(0)

    @property
    def optimum(self) -> Tensor:
        """The point where the mean of the gradients is zero, ``[d]``."""
        return (self.curvatures * self.minima).mean(0) / self.curvature

    @property
    def heterogeneity(self) -> float:
        """zeta^2 at the optimum: the mean of the squared norms of the workers' gradients."""
        return float(self.gradients(self.optimum).square().sum(-1).mean())


class Trajectory(NamedTuple):
    """The trajectories of many runs, ``[steps, runs]`` each.

    Attributes:
        grad_sq: ``||grad f(x_k)||^2``.
        deviation_sq: ``||v_k - grad f(x_k)||^2``.
    """

    grad_sq: Tensor
    deviation_sq: Tensor


def descend(
    problem: Quadratics,
    start: Tensor,
    *,
    lr: float,
    beta: float,
    steps: int,
    bias: BiasOperator,
    noise: float | Tensor = 0.0,
    runs: int = 1,
    seed: int = 0,
) -> Trajectory:
    """Momentum from ``v_{-1} = 0`` on the mean of the workers' biased gradients, in float64.

    Args:
        problem: the workers' quadratics.
        start: ``x_0 [d]`` of every run, or ``[runs, d]``.
        lr: the step size gamma.
        beta: weight of the new gradient.
        steps: the number of updates.
        bias: each worker's operator.
        noise: standard deviation of the normal noise on each entry of each worker's gradient, a number or ``[d]``.
        runs: the number of runs, each with its own noise.
        seed: of the noise; equal seeds give equal noise, whatever the other arguments.

    Returns:
        Their trajectories; entry k belongs to ``x_k``, before its update.
    """
    generator = torch.Generator().manual_seed(seed)
    n, d = problem.minima.shape
    x = torch.nn.Parameter(start.expand(runs, d).clone())
    optimizer = CompositeMomentum([x], lr=lr, beta=beta)
    bias.reset()
    grad_sq, deviation_sq = x.new_empty(steps, runs), x.new_empty(steps, runs)
    for k in range(steps):
        gradients = problem.gradients(x.detach())
        true = gradients.mean(-2)
        noises = torch.randn(runs, n, d, generator=generator, dtype=x.dtype) * noise
        x.grad = bias(gradients + noises, step=k).mean(-2)
        optimizer.step()
        grad_sq[k] = true.square().sum(-1)
        deviation_sq[k] = (optimizer.state[x]["momentum"] - true).square().sum(-1)
    return Trajectory(grad_sq, deviation_sq)


class Measured(NamedTuple):
    """A mean over runs, and the half-width of its 95 % interval (normal)."""

    mean: float
    halfwidth: float

    def __str__(self) -> str:
        return f"{self.mean:.3g} ± {self.halfwidth:.1g}"


def measured(values: Tensor) -> Measured:
    """The estimate from one value per run, for at least two runs."""
    return Measured(float(values.mean()), normal_halfwidth(float(standard_error(values))))


def steps_to(values: Tensor, target: float) -> int | None:
    """The first step at which the value is at or below the target."""
    below = (values <= target).nonzero()
    return int(below[0]) if len(below) else None
