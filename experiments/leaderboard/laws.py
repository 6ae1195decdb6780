"""Exact laws of whole gradients on the quadratics and regressions, for any step and not only in the limit."""

from __future__ import annotations

import torch
from torch import Tensor

from metamom.experiments.leaderboard.methods import Setup
from metamom.experiments.leaderboard.problems import WORKERS, Noisy, Problem
from metamom.experiments.leaderboard.regressions import Regressions


def expected_error(problem: Noisy, beta: float, gamma: float, steps: int) -> Tensor:
    """``E ||grad f(x_k)||^2`` over that of the start for ``k = 0..steps``, ``[steps + 1]``: exact.

    Each axis of ``(x - x*, v)`` is a linear recursion with the matrix ``[[1 - gamma beta lam, -gamma (1 - beta)],
    [beta lam, 1 - beta]]`` and the noise ``beta xi`` in v; means and covariances follow by it.
    """
    f = problem.honest
    lam, variance = f.curvature, problem.noise**2 / WORKERS
    keep, ones = 1 - beta, torch.ones_like(lam)
    rows = [torch.stack([1 - gamma * beta * lam, -gamma * keep * ones], -1), torch.stack([beta * lam, keep * ones], -1)]
    A = torch.stack(rows, -2)
    kick = beta * torch.tensor([-gamma, 1.0], dtype=lam.dtype)
    noise = variance * torch.outer(kick, kick)
    mean = torch.stack([ones, 0 * ones], -1).unsqueeze(-1)
    second = mean @ mean.mT
    out = []
    for _ in range(steps + 1):
        out.append(float((lam.square() * second[:, 0, 0]).sum() / lam.square().sum()))
        second = A @ second @ A.mT + noise
    return torch.tensor(out, dtype=torch.float64)


def law(problem: Problem, setup: Setup, gamma: float, steps: int, last: int) -> float | None:
    """The expected error after all steps, averaged over the last; ``None`` where no law is known."""
    whole = setup.spec == "none" and not setup.normalize and setup.aggregate == "mean" and setup.rule == "momentum"
    if isinstance(problem, Noisy) and whole and problem.attackers == 0:
        return float(expected_error(problem, setup.beta, gamma, steps)[-last:].mean())
    return None


def composite_floor(problem: Regressions) -> float:
    """The error at the mean iterate of whole gradients, for every beta and stable gamma."""
    return problem.floor().floor / float(problem.gains.mean(0).square().sum())
