"""The bounds of DIANA, MARINA and DASHA at their largest steps, on quadratics of workers that differ."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from metamom.bias import DASHA, DIANA, MARINA, BiasOperator, RandK
from metamom.theory import (
    bound_dasha,
    bound_diana,
    bound_marina,
    dasha_step,
    dasha_weight,
    diana_alpha,
    diana_step,
    marina_step,
)

N, D, K, RUNS = 4, 4, 40, 12
OMEGA = 1.0  # Rand-K scaled, half of the entries


class Problem:
    """``f_i(x) = 1/2 sum_j a_ij (x_j - c_ij)^2``."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.a = 0.5 + torch.rand(N, D, generator=generator, dtype=torch.float64)
        self.c = 6 * torch.rand(N, D, generator=generator, dtype=torch.float64) - 3
        self.L = float(self.a.mean(0).max())
        self.L_tilde = float(self.a.amax(1).square().mean().sqrt())

    def gradients(self, x: torch.Tensor) -> torch.Tensor:
        return self.a * (x - self.c)

    def value(self, x: torch.Tensor) -> float:
        return float((self.a * (x - self.c).square()).sum(1).mean() / 2)

    @property
    def delta0(self) -> float:
        zero = torch.zeros(D, dtype=torch.float64)
        return self.value(zero) - self.value((self.a * self.c).sum(0) / self.a.sum(0))

    @property
    def square0(self) -> float:
        """The mean squared norm of the workers' gradients at the start, 0."""
        return float(self.gradients(torch.zeros(D, dtype=torch.float64)).square().sum(1).mean())


def averages(problem: Problem, operator: BiasOperator, gamma: float) -> list[float]:
    """The mean of ``||grad f||^2`` over K steps from 0, for each of several seeds."""
    found = []
    for run in range(RUNS):
        operator.reset()
        x, total = torch.zeros(D, dtype=torch.float64), 0.0
        for step in range(K):
            g = problem.gradients(x)
            total += float(g.mean(0).square().sum())
            # MARINA's coin and the draws go by the step: each run has steps of its own
            x = x - gamma * operator(g, step=run * K + step).mean(0)
        found.append(total / K)
    operator.reset()
    return found


@pytest.mark.parametrize("method", ["diana", "marina", "dasha"])
def test_the_bounds_hold_at_the_largest_step(method):
    problem, inner = Problem(), RandK(D // 2, scaled=True)
    assert inner.constants(D).M == OMEGA
    sizes = {"L": problem.L, "L_tilde": problem.L_tilde, "workers": N}
    start = {"delta0": problem.delta0, "K": K}
    operator: BiasOperator
    if method == "diana":
        alpha = diana_alpha(OMEGA)
        operator, gamma = DIANA(inner, alpha), diana_step(OMEGA, alpha, **sizes)
        bound = bound_diana(OMEGA, alpha, **sizes, gamma=gamma, shift_error_sq=problem.square0, **start)
    elif method == "marina":
        operator, gamma = MARINA(inner, 0.5), marina_step(OMEGA, 0.5, **sizes)
        bound = bound_marina(OMEGA, 0.5, **sizes, gamma=gamma, **start)
    else:
        operator, gamma = DASHA(inner, dasha_weight(OMEGA)), dasha_step(OMEGA, **sizes)
        first = {"mean_error_sq": OMEGA * problem.square0 / N, "worker_error_sq": OMEGA * problem.square0}
        bound = bound_dasha(OMEGA, **sizes, gamma=gamma, **first, **start)
    found = averages(problem, operator, gamma)
    assert statistics.mean(found) + 5 * statistics.stdev(found) / math.sqrt(RUNS) <= bound


def test_without_compression_they_are_gradient_descent():
    """omega = 0: the steps and bounds of gradient descent, DIANA's half as long."""
    sizes = {"L": 2.0, "L_tilde": 3.0, "workers": 5}
    assert (diana_alpha(0), dasha_weight(0)) == (1, 1)
    assert marina_step(0.0, 0.3, **sizes) == dasha_step(0.0, **sizes) == marina_step(7.0, 1.0, **sizes) == 0.5
    assert diana_step(0.0, 1.0, **sizes) == 0.25
    with pytest.raises(ValueError, match=r"alpha <= 1/\(1 \+ omega\) = 0\.25; got 0\.5"):
        diana_step(3.0, 0.5, **sizes)
