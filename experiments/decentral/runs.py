"""One method on one kind of gradients: many runs at once, and where they end."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from metamom.bias import parse
from metamom.common.intervals import normal_halfwidth, squared_norm
from metamom.decentral import decentralized_step, initial_state
from metamom.experiments.decentral.problem import DecentralFloors, Gradients, Method
from metamom.optim import CompositeMomentum


class Run(NamedTuple):
    """What remains of R runs.

    Attributes:
        mean: each run's weights, averaged over workers and over the last steps, ``[R, d]``.
        end: the weights at the end, ``[n, R, d]``.
        grad_sq: ``||grad f||^2`` at the workers' mean before every step, averaged over runs, ``[steps]``.
        apart: ``1/n sum_i ||x_i - mean||^2``, averaged over runs and the last steps.
    """

    mean: Tensor
    end: Tensor
    grad_sq: Tensor
    apart: float


class Floor(NamedTuple):
    """``||grad f||^2`` at the mean weights, the half-width of its 95 % interval, and the workers' distance squared."""

    value: float
    halfwidth: float
    apart: float


def run(
    config: DecentralFloors, gradients: Gradients, method: Method, *, lr: float, noise: float, runs: int, steps: int
) -> Run:
    """Momentum from weights of zero. Equal seeds give equal noise, whatever the method."""
    generator = torch.Generator().manual_seed(config.seed + 2)
    operator = parse(gradients.operator)
    x = torch.zeros(config.n, runs, config.d, dtype=torch.float64)
    state, mixing = initial_state(x), method.mixing(config)
    server = torch.nn.Parameter(x[0].clone())
    optimizer = CompositeMomentum([server], lr=lr, beta=config.beta)
    last = min(config.last, steps)
    total, apart, grad_sq = torch.zeros(runs, config.d, dtype=torch.float64), 0.0, torch.empty(steps)
    for k in range(steps):
        mean = x.mean(0)
        grad_sq[k] = gradients.gradient(mean).square().sum(-1).mean()
        if k >= steps - last:
            total += mean
            apart += float((x - mean).square().sum(-1).mean()) / last
        g = gradients.at(x) + noise * torch.randn(x.shape, generator=generator, dtype=x.dtype)
        g = operator(g.view(-1, config.d), step=k).view(x.shape)  # each run has workers of its own
        if method.graph == "server":
            server.grad = g.mean(0)
            optimizer.step()
            x = server.detach().expand_as(x).clone()
        else:
            x, state = decentralized_step(
                x, g, state, mixing, lr=lr, beta=config.beta, tracking=method.tracking
            )  # fmt: skip
    return Run(total / last, x, grad_sq, apart)


def noisy_floor(config: DecentralFloors, gradients: Gradients, method: Method) -> Floor:
    """The floor with noise: an estimate without bias from the runs' mean weights."""
    found = run(config, gradients, method, lr=config.lr, noise=config.noise, runs=config.runs, steps=config.steps)
    squared = squared_norm(gradients.gradient(found.mean))
    return Floor(squared.value, normal_halfwidth(squared.error), found.apart)


def exact_floor(config: DecentralFloors, gradients: Gradients, method: Method, lr: float) -> float:
    """The floor without noise: ``||grad f||^2`` at the workers' mean at the end of one run."""
    steps = round(config.steps * max(1.0, config.lr / lr))
    found = run(config, gradients, method, lr=lr, noise=0.0, runs=1, steps=steps)
    return float(gradients.gradient(found.end.mean(0)).square().sum())
