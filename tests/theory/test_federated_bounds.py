"""The bounds of EF21-PP and EF21-P at their largest steps, on quadratics of workers that differ."""

from __future__ import annotations

import itertools
import math
import statistics

import pytest
import torch
from test_differences_bounds import D, K, N, Problem

from metamom.bias import EF21, TopK
from metamom.server import DownBias, Participation
from metamom.server.aggregate import Aggregation
from metamom.theory import bound_ef21_p, bound_ef21_pp, ef21_p_step, ef21_pp_step, ef21_step

ALPHA = 1 / D  # Top-1


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_absent_workers(share):
    problem, found = Problem(), []
    gamma = ef21_pp_step(ALPHA, share, problem.L, problem.L_tilde)
    for seed in range(10):
        operator, participation = EF21(TopK(1)), Participation(share, seed=seed)
        x, total = torch.zeros(D, dtype=torch.float64), 0.0
        for _ in range(K):
            g, present = problem.gradients(x), participation.present(N)
            total += float(g.mean(0).square().sum())
            server = Aggregation(N, operator, present=present)
            server.add(g[list(present)], present)
            x = x - gamma * server.finish()[0]
            participation.advance()
        found.append(total / K)
    start = {"delta0": problem.delta0, "start_error_sq": (1 - share * ALPHA) * problem.square0, "K": K}
    bound = bound_ef21_pp(ALPHA, share, problem.L, problem.L_tilde, gamma=gamma, **start)
    assert statistics.mean(found) + 5 * statistics.stdev(found) / math.sqrt(len(found)) <= bound


def test_one_step_contracts_by_the_share_times_the_operator_s():
    """Enumerated over the sets of 2 of 4 workers, for rows whose Top-1 loses the most: ``1 - alpha_c / 2``."""
    rows = torch.ones(N, D, dtype=torch.float64) * torch.tensor([[1.0], [2.0], [3.0], [4.0]], dtype=torch.float64)
    errors = []
    for present in itertools.combinations(range(N), 2):
        operator = EF21(TopK(1))
        server = Aggregation(N, operator, present=present)
        server.add(rows[list(present)], present)
        server.finish()
        errors.append(float((operator.state["estimate"] - rows).square().sum()))
    assert statistics.mean(errors) / float(rows.square().sum()) == pytest.approx(1 - ALPHA / 2, rel=1e-12)


def test_a_compressed_message():
    problem = Problem()
    gamma = ef21_p_step(ALPHA, problem.L)
    down, w, total = DownBias(TopK(1)), torch.zeros(D, dtype=torch.float64), 0.0
    for _ in range(K):
        seen = down.next(w)
        down.commit(seen)
        total += float(problem.gradients(w).mean(0).square().sum())
        w = w - gamma * problem.gradients(seen.weights).mean(0)
    assert total / K <= bound_ef21_p(ALPHA, problem.L, gamma, problem.delta0, K)
    first, last = (float(problem.gradients(at).mean(0).square().sum()) for at in (0 * w, w))
    assert last < 0.2 * first


def test_whole_messages_are_gradient_descent():
    assert ef21_pp_step(0.3, 1.0, 1.0, 2.0) == ef21_step(0.3, 1.0, 2.0)
    assert ef21_p_step(1.0, 4.0) == 0.25


@pytest.mark.parametrize(("operator", "low", "high"), [(EF21(TopK(1)), 0.0, 1e-12), (None, 1e-3, 1e3)])
def test_remembered_estimates_leave_no_floor(operator, low, high):
    """With half of the workers present; the mean over those that are present moves with the draws."""
    problem, participation, x = Problem(), Participation(0.5), torch.zeros(D, dtype=torch.float64)
    last = []
    for _ in range(1500):
        present = participation.present(N)
        server = Aggregation(N, operator, present=present)
        server.add(problem.gradients(x)[list(present)], present)
        x = x - 0.05 * server.finish()[0]
        participation.advance()
        last.append(float(problem.gradients(x).mean(0).square().sum()))
    assert low <= statistics.mean(last[-100:]) < high
