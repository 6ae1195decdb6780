"""The three first experiments: what they measure is what theory says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from metamom.bias import Identity
from metamom.experiments.first import floors, law, tuned
from metamom.experiments.first.__main__ import EXPERIMENTS
from metamom.experiments.first.workers import OPERATORS, workers_that_differ
from metamom.experiments.quadratics import Quadratics, descend, measured, steps_to
from metamom.theory import stable_limit

LAW = law.StationaryLaw(steps=900, last=500, runs=60)
FLOORS = floors.OperatorFloors(steps=400, last=100, runs=4)
TUNED = tuned.TunedMethods(lrs=(0.25, 4.0), betas=(1.0, 0.3), steps=40, last=20, runs=2)


def test_gradients_of_many_points_at_once():
    problem, _ = workers_that_differ()
    x = torch.randn(3, 20, dtype=torch.float64, requires_grad=True)
    a, c = problem
    losses = 0.5 * (a * (x[:, None] - c) ** 2).sum(-1)  # [3, 10]
    (gradient,) = torch.autograd.grad(losses.mean(1).sum(), x)
    torch.testing.assert_close(problem.gradients(x.detach()).mean(1), gradient)
    assert float(problem.gradients(problem.optimum).mean(0).norm()) < 1e-14


def test_descend_is_the_recursion_written_out():
    """One quadratic in one dimension, no noise: theory's trajectory with a constant bias as its minimum."""
    problem = Quadratics(torch.ones(1, 1, dtype=torch.float64), torch.full((1, 1), -0.3, dtype=torch.float64))
    trajectory = descend(problem, torch.ones(1, dtype=torch.float64), lr=1 / 3, beta=0.5, steps=4, bias=Identity())
    x, v = 1.0, 0.0
    for k in range(4):
        v = 0.5 * v + 0.5 * (x + 0.3)
        assert float(trajectory.grad_sq[k]) == pytest.approx((x + 0.3) ** 2, rel=1e-12)
        assert float(trajectory.deviation_sq[k]) == pytest.approx((v - x - 0.3) ** 2, rel=1e-9, abs=1e-15)
        x -= v / 3


@pytest.mark.parametrize("beta", [1.0, 0.2])
@pytest.mark.parametrize("rule", LAW.step_rules, ids=["fixed", "largest"])
def test_what_is_measured_follows_the_law(rule, beta):
    """Within five standard errors; the largest of four z-values, of runs that are independent."""
    lr = LAW.step_rules[rule](beta)
    point, exact = law.measure(LAW, lr, beta), law.exact(LAW, lr, beta)
    for value, truth in ((point.grad_sq, exact.grad_sq), (point.deviation_sq, exact.deviation_sq)):
        assert abs(value.mean - truth) < 5 * value.halfwidth / 1.96
        assert value.halfwidth < 0.1 * truth  # or the line above says nothing


def test_the_experiment_s_point_beta_moves_the_deviation_not_the_gradient():
    laws = [law.exact(LAW, LAW.lr, beta) for beta in LAW.betas]
    assert max(exact.grad_sq for exact in laws) < 1.1 * min(exact.grad_sq for exact in laws)
    deviations = [exact.deviation_sq for exact in laws]
    assert deviations == sorted(deviations, reverse=True)
    assert deviations[0] > 10 * deviations[-1]


def test_no_beta_lowers_the_floor_of_clipping_and_error_feedback_removes_it():
    values = [floors.measure(FLOORS, "clip:1", beta).floor.mean for beta in (1.0, 0.1)]
    assert max(values) < 1.02 * min(values)
    assert floors.measure(FLOORS, "clip21:1", 0.3).floor.mean < 0.02 * min(values)


def test_error_feedback_removes_the_floor_of_top_k():
    biased, cured = (floors.measure(FLOORS, spec, 1.0) for spec in ("topk:10%", "ef21:topk:10%"))
    assert cured.floor.mean < 0.01 * biased.floor.mean
    assert cured.steps < biased.steps


def test_the_search_marks_what_diverges():
    grid = tuned.search(TUNED, "none")
    problem, _ = workers_that_differ()
    limit = stable_limit(float(problem.curvature.max()), 1.0)
    assert [np.isfinite(value) for value in grid.floors[:, 0]] == [lr < limit for lr in TUNED.lrs] == [True, False]
    assert tuned.best(np.array([[3.0, 1.0], [2.0, np.inf]]), [0]) == (1, 0)
    assert tuned.best(np.array([[3.0, 1.0], [2.0, np.inf]]), [0, 1]) == (0, 1)


def test_steps_and_intervals():
    assert steps_to(torch.tensor([3.0, 2.0, 1.0, 2.0]), 2.0) == 1
    assert steps_to(torch.tensor([3.0]), 2.0) is None
    value = measured(torch.tensor([1.0, 3.0], dtype=torch.float64))
    assert value.mean == 2
    assert value.halfwidth == pytest.approx(1.959964)  # sqrt(2) / sqrt(2) standard errors


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_shows_a_table_and_a_figure(name, tmp_path):
    config: Any = {
        "law": replace(LAW, steps=20, last=10, runs=2),
        "floors": replace(FLOORS, steps=20, last=10, runs=2),
        "tuned": TUNED,
    }[name]
    figure = tmp_path / "figures" / "it.png"
    table = EXPERIMENTS[name].show(figure, config)
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert "nan" not in table
    for operator in OPERATORS if name != "law" else ("0.2",):
        assert f"| {operator} |" in table
