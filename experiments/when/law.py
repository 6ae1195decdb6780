"""The exact law, stationary and at every step, against runs of `CompositeMomentum` on random quadratics."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from metamom.bias.base import BiasOperator
from metamom.bias.coordinates import Coordinates
from metamom.common.intervals import standard_error
from metamom.experiments.quadratics import Quadratics, descend
from metamom.experiments.when.transient import moments
from metamom.theory import stable_limit, stationary


@dataclass(frozen=True)
class LawCheck:
    """Random gamma, beta, bias, noise and number of workers; curvatures 1 to 1/5."""

    designs: int = 40
    dimension: int = 5
    runs: int = 60
    steps: int = 800
    last: int = 300
    looks: tuple[int, ...] = (1, 2, 5, 10, 20, 50)  # steps at which the trajectory is compared
    seed: int = 0

    @property
    def curvatures(self) -> Tensor:
        """``[d]``."""
        return torch.logspace(0, -math.log10(5), self.dimension, dtype=torch.float64)


class Shift(BiasOperator):
    """``C(g) = g + b``: the same bias on every worker and in every step."""

    def __init__(self, b: Tensor) -> None:
        self.b = b

    def _apply(self, rows: Tensor, place: Coordinates) -> Tensor:
        return rows + self.b

    @property
    def spec(self) -> str:
        """There is no spelling for the command line."""
        return "shift"


class Design(NamedTuple):
    """One draw of everything: bias ``[d]``, and the noise's standard deviation on each entry of each worker."""

    lr: float
    beta: float
    bias: Tensor
    noise: float
    workers: int


class Compared(NamedTuple):
    """A mean over runs, its standard error, and the exact value."""

    mean: float
    error: float
    exact: float

    @property
    def z(self) -> float:
        """The deviation in standard errors."""
        return abs(self.mean - self.exact) / self.error


class Point(NamedTuple):
    """One design's stationary gradient and deviation, and its gradient along the trajectory."""

    design: Design
    grad_sq: Compared
    deviation_sq: Compared
    trajectory: list[Compared]


def designs(config: LawCheck) -> list[Design]:
    """Step sizes from 3 to 80 % of each beta's limit, at most 4; biases, noise and workers over two decades."""
    draws = torch.Generator().manual_seed(config.seed)

    def between(low: float, high: float) -> float:
        return low * math.exp(math.log(high / low) * float(torch.rand((), generator=draws)))

    drawn = []
    for _ in range(config.designs):
        beta = between(0.05, 1.0)
        lr = min(stable_limit(1.0, beta) * between(0.03, 0.8), 4.0)
        direction = torch.randn(config.dimension, generator=draws, dtype=torch.float64)
        bias = between(0.01, 1.0) * direction / direction.norm()
        drawn.append(Design(max(lr, 0.15), beta, bias, between(0.05, 2.0), int(between(1, 33))))
    return drawn


def exact_trajectory(config: LawCheck, design: Design, steps: int) -> list[float]:
    """``E ||grad f(x_k)||^2`` from x_0 = (1, ..., 1)."""
    lam, b = config.curvatures, design.bias
    beta = torch.tensor(design.beta, dtype=torch.float64)
    values = []
    for now in islice(moments(design.lr * lam, beta), steps):
        mean = (lam + b) * now.left - b
        values.append(float((mean.square() + design.noise**2 / design.workers * now.variance).sum()))
    return values


def compare(config: LawCheck, design: Design, *, seed: int) -> Point:
    """Run one design many times."""
    lam = config.curvatures
    problem = Quadratics(lam.repeat(design.workers, 1), torch.zeros(design.workers, len(lam), dtype=torch.float64))
    trajectory = descend(
        problem, torch.ones_like(lam), lr=design.lr, beta=design.beta, steps=config.steps, bias=Shift(design.bias),
        noise=design.noise, runs=config.runs, seed=seed,
    )  # fmt: skip
    law = stationary(lam, design.noise**2 / design.workers, design.bias, design.beta, design.lr)
    exact = exact_trajectory(config, design, max(config.looks) + 1)
    return Point(
        design,
        _compared(trajectory.grad_sq[-config.last :].mean(0), law.grad_sq),
        _compared(trajectory.deviation_sq[-config.last :].mean(0), law.deviation_sq),
        [_compared(trajectory.grad_sq[k], exact[k]) for k in config.looks],
    )


def points(config: LawCheck) -> list[Point]:
    """Check all designs."""
    bar = tqdm(designs(config), desc="law", disable=None)
    return [compare(config, design, seed=config.seed + 1 + number) for number, design in enumerate(bar)]


def _compared(values: Tensor, exact: float) -> Compared:
    return Compared(float(values.mean()), float(standard_error(values)), exact)
