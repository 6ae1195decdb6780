"""Sinusoids with MAML: a few inner points make the gradient biased, and nothing has a closed form."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from metamom.experiments.leaderboard.problems import WORKERS, Generators, Problem

HIDDEN = 16
SHAPES = ((HIDDEN, 1), (HIDDEN,), (HIDDEN, HIDDEN), (HIDDEN,), (1, HIDDEN), (1,))
SIZES = [math.prod(shape) for shape in SHAPES]


class Points(NamedTuple):
    """Inputs and values of J tasks of each worker, ``[..., n, J, points, 1]`` each."""

    support_x: Tensor
    support_y: Tensor
    query_x: Tensor
    query_y: Tensor


def network(weights: Tensor, x: Tensor) -> Tensor:
    """Two hidden layers of `HIDDEN` tanh units: weights ``[..., d]``, ``[..., points, 1] -> [..., points, 1]``."""
    parts = zip(torch.split(weights, SIZES, -1), SHAPES, strict=True)
    w0, b0, w1, b1, w2, b2 = (w.view(*w.shape[:-1], *(shape if len(shape) == 2 else (1, *shape))) for w, shape in parts)
    hidden = torch.tanh(torch.tanh(x @ w0.mT + b0) @ w1.mT + b1)
    out: Tensor = hidden @ w2.mT + b2
    return out


def squared_error(weights: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The mean over the points, ``[...]``."""
    return (network(weights, x) - y).square().mean((-2, -1))


def meta_losses(weights: Tensor, alpha: float, points: Points, *, differentiable: bool) -> Tensor:
    """Each task's query loss after an inner step on its support points, for weights ``[..., n, J, d]``."""
    inner = squared_error(weights, points.support_x, points.support_y).sum()
    (gradient,) = torch.autograd.grad(inner, weights, create_graph=differentiable)
    return squared_error(weights - alpha * gradient, points.query_x, points.query_y)


@dataclass(frozen=True)
class Sinusoids(Problem):
    """Five workers with fixed sinusoids of their own; the error is the loss on many points after a step on many.

    Args:
        tasks: of each worker.
        alpha: inner step size.
        m: support points of a step.
        q: query points of a step.
        population: support and query points that stand for all points of a task.
    """

    name: str = "composite"
    title: str = "sinusoids, composite"
    operator: str = "topk:1%"
    tasks: int = 1
    alpha: float = 0.05
    m: int = 5
    q: int = 10
    population: int = 40
    target: float = 1.5
    every: int = 10
    share: float = 0.5
    unit: ClassVar[float] = 1.0
    sign: ClassVar[str] = ""

    @cached_property
    def shapes(self) -> tuple[Tensor, Tensor]:
        """Amplitudes and phases of the tasks, ``[n, J, 1, 1]``: worker i has the amplitudes of band i of five."""
        generator = torch.Generator().manual_seed(3)
        share, phase = torch.rand(2, WORKERS, self.tasks, 1, 1, generator=generator)
        return 0.5 + 3.5 * (torch.arange(WORKERS).view(-1, 1, 1, 1) + share) / WORKERS, math.pi * phase

    @cached_property
    def start(self) -> Tensor:
        """Normal weights of variance 1/(inputs), zero biases."""
        generator = torch.Generator().manual_seed(4)
        drawn = [
            torch.randn(s, generator=generator) / math.sqrt(s[-1]) if len(s) == 2 else torch.zeros(s) for s in SHAPES
        ]
        return torch.cat([w.flatten() for w in drawn])

    @cached_property
    def all_points(self) -> Points:
        """``[n, J, population, 1]``, evenly spaced; the queries lie halfway between."""
        x = torch.linspace(-5, 5, 2 * self.population).expand(WORKERS, self.tasks, -1).unsqueeze(-1)
        amplitude, phase = self.shapes
        y = amplitude * torch.sin(x + phase)
        return Points(x[..., ::2, :], y[..., ::2, :], x[..., 1::2, :], y[..., 1::2, :])

    def draw(self, generators: Generators) -> Points:
        """Fresh points of every task, ``[S, n, J, points, 1]``."""
        size = (WORKERS, self.tasks, self.m + self.q, 1)
        x = 10 * torch.stack([torch.rand(size, generator=g) for g in generators]) - 5
        amplitude, phase = self.shapes
        y = amplitude * torch.sin(x + phase)
        return Points(x[..., : self.m, :], y[..., : self.m, :], x[..., self.m :, :], y[..., self.m :, :])

    def gradients(self, x: Tensor, sample: Points) -> Tensor:
        """See `Problem.gradients`."""
        of_workers = x.unsqueeze(-2).expand(*x.shape[:-1], self.workers, -1).clone().requires_grad_()
        losses = meta_losses(self._of_tasks(of_workers), self.alpha, sample, differentiable=True)
        return torch.autograd.grad(losses.mean(-1).sum(), of_workers)[0]

    def error(self, x: Tensor) -> Tensor:
        """The mean over workers and tasks of the loss on all points."""
        of_workers = x.unsqueeze(-2).expand(*x.shape[:-1], self.workers, -1).clone().requires_grad_()
        losses = meta_losses(self._of_tasks(of_workers), self.alpha, self.all_points, differentiable=False)
        return losses.detach().mean((-2, -1))

    def _of_tasks(self, of_workers: Tensor) -> Tensor:
        """Weights ``[..., n, d] -> [..., n, J, d]``."""
        return of_workers.unsqueeze(-2).expand(*of_workers.shape[:-1], self.tasks, -1)
