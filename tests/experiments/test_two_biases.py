"""The bounds of docs/theory/sources.md on what `experiments.two_biases` measures."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from metamom import CompositeMomentum
from metamom.experiments import two_biases
from metamom.experiments.two_biases import bias_of_order, floor_of_aggregate, floor_of_order, workers
from metamom.server.robust import robust_mean


@pytest.mark.parametrize("how", ["median", "trimmed:0.2", pytest.param("geomedian", marks=pytest.mark.slow)])
def test_no_beta_lowers_the_floor_of_a_robust_mean(how):
    problem = workers()
    floors = [floor_of_aggregate(problem, how, beta) for beta in (1.0, 0.3, 0.1)]
    assert max(floors) - min(floors) < 1e-3 * max(floors)
    # the curvatures differ by a factor of two, so zeta^2 at the fixed point is near the one at the optimum
    assert 1e-4 < max(floors) < problem.heterogeneity
    bias = robust_mean(problem.gradients(problem.optimum), how)
    assert 0 < float(bias.square().sum()) <= problem.heterogeneity


def test_the_mean_has_no_floor():
    assert floor_of_aggregate(workers(), "mean", 0.3) < 1e-25


@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_the_floor_of_reshuffling_goes_with_the_square_of_the_step(beta):
    """And that of independent draws with the step."""
    floors = {
        order: [floor_of_order(workers(), order, beta, lr) for lr in (0.05, 0.025)] for order in two_biases.ORDERS
    }
    assert 3.3 < floors["reshuffle"][0] / floors["reshuffle"][1] < 4.8
    assert 1.6 < floors["replacement"][0] / floors["replacement"][1] < 2.6
    assert floors["reshuffle"][0] < 0.2 * floors["replacement"][0]


AMPLITUDES, SHIFTS = (0.5, 1.0, 0.8), (0.0, 1.0, 2.5)  # of f_i(x) = a_i (1 - cos(x - s_i)): L = G = max a_i


def loss(x: Tensor, worker: int) -> Tensor:
    return AMPLITUDES[worker] * (1 - torch.cos(x - SHIFTS[worker]))


def mean_loss(x: Tensor) -> Tensor:
    return torch.stack([loss(x, worker) for worker in range(3)]).mean(0)


@pytest.mark.parametrize("beta", [1.0, 0.5, 0.1])
@pytest.mark.parametrize("share", [1.0, 0.3, 0.05])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)], ids=str)
def test_the_bound_on_reshuffling_holds_in_every_order(beta, share, order):
    """Orders that never change, too."""
    N, L, G, rounds = 3, max(AMPLITUDES), max(AMPLITUDES), 25
    lr = share / (L * N)
    grid = torch.linspace(-math.pi, math.pi, 20001, dtype=torch.float64)
    lowest = float(mean_loss(grid).min())
    for start in (-2.0, 0.4, 3.0):
        x = torch.nn.Parameter(torch.tensor(start, dtype=torch.float64))
        optimizer = CompositeMomentum([x], lr=lr, beta=beta)
        gap = float(mean_loss(x.detach())) - lowest
        squares = []
        for _ in range(rounds):
            momentum = optimizer.state[x].get("momentum", torch.zeros_like(x)) if optimizer.state else torch.zeros(())
            z = (x.detach() - lr * (1 - beta) / beta * momentum).requires_grad_()
            (gradient,) = torch.autograd.grad(mean_loss(z), z)
            squares.append(float(gradient**2))
            for worker in order:
                optimizer.zero_grad()
                loss(x, worker).backward()
                optimizer.step()
        bound = 2 * gap / (lr * N * rounds) + (L * lr * G) ** 2 * ((N - 1) / 2 + (1 - beta) / beta) ** 2
        assert sum(squares) / rounds <= bound * (1 + 1e-9)


def test_the_bias_of_a_reshuffled_step():
    """Given the tasks that are left, a step's gradient has their mean: zeta^2 (H_n - 1)/(n - 1) over a round."""
    problem = workers()
    expected = problem.heterogeneity * (1 / 2 + 1 / 3 + 1 / 4 + 1 / 5) / 4
    assert bias_of_order(problem, "reshuffle") == pytest.approx(expected, rel=1e-12)
    assert bias_of_order(problem, "replacement") < 1e-30
    assert expected == pytest.approx(0.136, abs=5e-4)  # as docs/theory/sources.md says
