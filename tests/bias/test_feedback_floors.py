"""Floors of biased operators without error feedback and with it, on workers' quadratics.

Worker i has f_i(x) = 1/2 sum_j a_ij (x_j - c_ij)^2, so that everything has a closed form; all in float64.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from operators import each
from torch import Tensor

from metamom import (
    Clip,
    Compose,
    RandK,
    Sign,
    TopK,
)  # fmt: skip
from metamom.bias import EF14, EF21, EF21SGDM, BiasOperator, Clip21

BETAS = (1.0, 0.3, 0.1)


class Workers(NamedTuple):
    """Curvatures ``a [n, d]`` and centres ``c [n, d]``."""

    a: Tensor
    c: Tensor

    @property
    def optimum(self) -> Tensor:
        return (self.a * self.c).sum(0) / self.a.sum(0)

    def gradients(self, x: Tensor) -> Tensor:
        return self.a * (x - self.c)

    def value(self, x: Tensor) -> float:
        return float((self.a * (x - self.c).square()).sum(1).mean() / 2)

    def square(self, x: Tensor) -> float:
        """``||grad f(x)||^2``."""
        return self.squares(x[None])[0]

    def squares(self, xs: Tensor) -> list[float]:
        """Of each of several points ``[K, d]``."""
        gradients: list[float] = (self.a * (xs[:, None] - self.c)).mean(1).square().sum(1).tolist()
        return gradients

    def zeta2(self, x: Tensor) -> float:
        g = self.gradients(x)
        return float((g - g.mean(0)).square().sum(1).mean())


def random_workers(n: int = 4, d: int = 6, alike: bool = False) -> Workers:
    generator = torch.Generator().manual_seed(0)
    a, c = (torch.rand(1 if alike else n, d, generator=generator, dtype=torch.float64) for _ in range(2))
    return Workers((0.5 + a).expand(n, d), (6 * c - 3).expand(n, d))


def vectors(*rows: list[float]) -> Workers:
    """Of curvature one."""
    c = torch.tensor(rows, dtype=torch.float64)
    return Workers(torch.ones_like(c), c)


def descend(
    workers: Workers, operator: BiasOperator, *, beta: float = 1.0, lr: float = 0.1, steps: int = 1000
) -> tuple[Tensor, list[float]]:
    """The last point, and the squared gradient norms on the way, from 0; v_{-1} = 0."""
    operator.reset()
    x = torch.zeros_like(workers.c[0])
    v = torch.zeros_like(x)
    points = []
    for step in range(steps):
        points.append(x)
        v = (1 - beta) * v + beta * operator(workers.gradients(x), step=step).mean(0)
        x = x - lr * v
    return x, workers.squares(torch.stack(points))


# without error feedback

CLIPPED = random_workers()


FLOORS = {
    # Workers 1 and 2 keep the first entry, 3 and 4 the second: each coordinate is the mean of its keepers' centres.
    "topk": (TopK(1), vectors([-10, 3], [12, 3], [0, 20], [0, -12]), [1.0, 4.0]),
    # One worker in each quadrant: their 1-norms balance across both diagonals.
    "sign": (Sign(), vectors([-4, -3], [-6, 7], [3, -9], [5, 2]), [-0.25, 0.25]),
    "clip": (Clip(0.5), CLIPPED, None),
}


@pytest.mark.parametrize("name", FLOORS)
def test_no_beta_lowers_the_floor_of_workers_that_differ(name):
    operator, workers, expected = FLOORS[name]
    ends = [descend(workers, operator, beta=beta, steps=2500)[0] for beta in BETAS]
    for x in ends:
        torch.testing.assert_close(x, ends[0], rtol=0, atol=1e-8)
        if expected is not None:
            torch.testing.assert_close(x, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-8)
    floor = workers.square(ends[0])
    norms = workers.gradients(ends[0]).norm(dim=1)
    constants = operator.constants(workers.c.shape[1], zeta2=workers.zeta2(ends[0]), bound=float(norms.max()))
    assert 0.01 < floor <= constants.floor
    assert float(operator(workers.gradients(ends[0])).mean(0).norm()) < 1e-8  # where it stops


@pytest.mark.parametrize("beta", BETAS)
@each([TopK(1), TopK(3), Sign(), Clip(0.5), Compose(Clip(0.5), TopK(2))])
def test_workers_alike_converge_exactly(operator, beta):
    workers = random_workers(alike=True)
    x, _ = descend(workers, operator, beta=beta)
    torch.testing.assert_close(x, workers.optimum, rtol=0, atol=1e-9)


@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_unscaled_rand_k_has_no_floor(beta):
    """b^2 = 0 although the workers differ; what is left is noise, which goes with the step size."""
    workers, operator = random_workers(), RandK(2)
    sigma2 = operator.constants(6, workers=4, zeta2=workers.zeta2(workers.optimum)).sigma2
    for lr in (0.1, 0.02):
        _, squares = descend(workers, operator, beta=beta, lr=lr, steps=int(25 / lr))
        assert sum(squares[len(squares) // 2 :]) / (len(squares) / 2) < lr * sigma2 * 4


# with error feedback


@pytest.mark.parametrize("name", FLOORS)
@pytest.mark.parametrize("kind", [EF21, EF21SGDM])
def test_feedback_removes_the_floor(kind, name):
    operator, workers, _ = FLOORS[name]
    x, _ = descend(workers, kind(operator), lr=0.05, steps=1500)
    torch.testing.assert_close(x, workers.optimum, rtol=0, atol=1e-8)


@each([TopK(1), TopK(2), Sign(), Compose(Clip(0.5), TopK(2))])
@pytest.mark.parametrize("kind", [EF21, EF21SGDM])
def test_feedback_removes_every_floor(kind, operator):
    workers = random_workers()
    x, _ = descend(workers, kind(operator), lr=0.05, steps=1500)
    torch.testing.assert_close(x, workers.optimum, rtol=0, atol=1e-8)


@pytest.mark.parametrize("tau", [0.1, 1.0, 10.0])
def test_clip21_is_gradient_descent_in_the_end(tau):
    workers = random_workers()
    operator = Clip21(tau)
    x, _ = descend(workers, operator, lr=0.05, steps=1200)
    torch.testing.assert_close(x, workers.optimum, rtol=0, atol=1e-9)
    torch.testing.assert_close(operator.state["estimate"], workers.gradients(x), rtol=0, atol=1e-9)


@each([TopK(1), Sign()])
def test_ef14_leaves_a_floor_that_goes_with_the_step_size(operator):
    """avg ||grad f||^2 <= 2 D0 / (gamma K) + L gamma a / (1-a) zeta^2 for gamma <= (1-a) / ((1+a) L)."""
    c = random_workers().c
    workers = Workers(torch.ones_like(c), c)  # of equal curvature, so that zeta^2 is the same everywhere
    a = math.sqrt(1 - operator.contraction(6))
    start = workers.value(torch.zeros(6, dtype=torch.float64)) - workers.value(workers.optimum)
    largest = (1 - a) / (1 + a)
    tails = []
    for lr in (largest, largest / 10):
        _, squares = descend(workers, EF14(operator), lr=lr, steps=1500)
        bound = 2 * start / (lr * 1500) + lr * a / (1 - a) * workers.zeta2(workers.optimum)
        assert sum(squares) / 1500 <= bound
        tails.append(sum(squares[1000:]) / 500)
    biased = descend(workers, operator, lr=largest / 10, steps=1500)[1]
    assert tails[1] < 0.1 * tails[0]
    assert tails[1] < 0.05 * sum(biased[1000:]) / 500


def largest_ef21_step(alpha: float, smoothness: float, mean_smoothness: float) -> float:
    """1 / (L + L~ a / (1-a)), a = sqrt(1 - alpha_c)."""
    a = math.sqrt(1 - alpha)
    return 1 / (smoothness + mean_smoothness * a / (1 - a))


@each([TopK(1), TopK(2), TopK(6), Sign()])
def test_ef21_keeps_its_bound_at_the_largest_step(operator):
    """avg ||grad f||^2 <= 2 D0 / (gamma K) + G0 / ((1-a) K), for every K (docs/theory/operators.md)."""
    assert largest_ef21_step(0.25, 1.0, 1.5) == pytest.approx(0.0934915622441133, abs=1e-15)
    workers = random_workers()
    alpha = operator.contraction(6)
    a = math.sqrt(1 - alpha)
    smoothness = float(workers.a.mean(0).max())
    lr = largest_ef21_step(alpha, smoothness, float(workers.a.max(1).values.square().mean().sqrt()))
    zero = torch.zeros(6, dtype=torch.float64)
    start = workers.value(zero) - workers.value(workers.optimum)
    g = workers.gradients(zero)
    missed = float((operator(g) - g).square().sum(1).mean())
    assert missed <= (1 - alpha) * float(g.square().sum(1).mean()) * (1 + 1e-12)
    _, squares = descend(workers, EF21(operator), lr=lr)
    total = 0.0
    for k, square in enumerate(squares, 1):
        total += square
        assert total / k <= 2 * start / (lr * k) + missed / ((1 - a) * k)
