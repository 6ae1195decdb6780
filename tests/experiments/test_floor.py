"""The floors that `experiments.floor` measures are the ones that theory predicts."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from metamom import MAML, CompositeMomentum
from metamom.common.intervals import normal_halfwidth, squared_norm
from metamom.experiments.floor import sinusoids
from metamom.experiments.floor.regressions import FIXED_POINTS, REMEDIES, Arm, RegressionFloor, predicted, run, show
from metamom.nets.models import SinusoidMLP
from metamom.tasks import FixedTasks, Sinusoid

SHORT = RegressionFloor(steps=100, last=80, blocks=10)


def test_predictions_are_those_of_the_reference():
    """w_m and ||grad f(w_m)||^2 for m = 2, and first order, worked out by hand elsewhere."""
    coupled, first_order = predicted(Arm("exact", 2), 0.5), predicted(Arm("first-order", 2), 0.5)
    assert coupled.end.tolist() == pytest.approx([0.7600950118764845, 0.23990498812351543], rel=1e-12)
    assert coupled.floor == pytest.approx(0.0036560389526125426, rel=1e-12)
    assert first_order.floor == pytest.approx(0.0016282195179584122, rel=1e-12)
    assert all(predicted(remedy, 0.5).floor < 1e-30 for remedy in REMEDIES)


@pytest.mark.parametrize("arm", [FIXED_POINTS[0], FIXED_POINTS[3], REMEDIES[1]], ids=str)
def test_runs_end_where_predicted(arm):
    """Within five standard errors, of ten blocks: Student's t with nine degrees of freedom."""
    end, truth = run(SHORT, arm, 0.3), predicted(arm, SHORT.alpha)
    assert ((end.mean - truth.end).abs() < 5 * end.error).all()
    assert float(end.error.max()) < 0.02  # or that says nothing: the fixed points are 0.2 apart


def test_beta_moves_the_noise_of_v_and_not_the_floor():
    """E||v - grad f||^2 is noise and the squared bias: the floor is taken off."""
    plain, momentum = (run(SHORT, FIXED_POINTS[0], beta) for beta in (1.0, 0.1))
    assert momentum.deviation_sq - momentum.floor < 0.5 * (plain.deviation_sq - plain.floor)
    assert abs(plain.floor - momentum.floor) < 3 * (plain.halfwidth + momentum.halfwidth)
    assert min(plain.floor, momentum.floor) > 0.002


def test_error_feedback_lowers_the_floor_of_top_k():
    longer = replace(SHORT, steps=300, last=250)  # the floor of Top-K is 1e-4: below the noise of fewer steps
    biased, cured = (run(longer, Arm("independent", 2, spec), 1.0) for spec in ("topk:1", "ef21-sgdm(0.1):topk:1"))
    assert cured.floor < 0.5 * biased.floor


def test_the_square_of_a_mean_without_bias():
    """By enumeration: over all draws of three values the estimates' mean is the square of the mean."""
    values = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 1.0]], dtype=torch.float64)
    draws = torch.cartesian_prod(*[torch.arange(3)] * 4)
    estimates = torch.tensor([squared_norm(values[draw]).value for draw in draws], dtype=torch.float64)
    assert float(estimates.mean()) == pytest.approx(float(values.mean(0).square().sum()), rel=1e-12)
    alike = squared_norm(torch.ones(5, 1, dtype=torch.float64))
    assert (alike.value, normal_halfwidth(alike.error)) == (pytest.approx(1.0), pytest.approx(0.0))


def test_the_table_and_the_figure(tmp_path):
    text = show(tmp_path / "floor.png", replace(SHORT, steps=12, last=10, blocks=5, betas=(1.0,)))
    assert "| exact, m = 2 | 1 |" in text
    assert "(0.7601, 0.2399)" in text
    assert (tmp_path / "floor.png").read_bytes().startswith(b"\x89PNG")


TINY = sinusoids.SinusoidFloor(
    tasks=3, m=2, queries=4, lr=0.001, steps=6, every=2, last=3, warm_steps=5, warm_m=10, population=50, draws=4,
    betas=(0.5,),
)  # fmt: skip


def test_an_arm_on_sinusoids_is_the_plain_loop():
    """From the given weights; F along the way and at the mean of the last iterates, by the loss after a step."""
    weights = sinusoids.start(TINY)
    end = sinusoids.run(TINY, sinusoids.Arm("first-order", 2), 0.5, weights)

    model = SinusoidMLP()
    vector_to_parameters(weights.clone(), model.parameters())
    learner = MAML(model, F.mse_loss, inner_lr=TINY.alpha, estimator="first-order")
    optimizer = CompositeMomentum(learner.parameters(), lr=0.001, beta=0.5)
    sampler, iterates = FixedTasks(Sinusoid(4, 4), 3), []
    for k in range(6):
        optimizer.zero_grad()
        learner.backward(sampler.sample(k, 3))
        optimizer.step()
        iterates.append(parameters_to_vector(learner.parameters()).detach())

    population = FixedTasks(Sinusoid(50, 50), 3).with_stream("population")

    def value(w, draws):
        vector_to_parameters(w, model.parameters())
        losses = [learner.losses(population.sample(draw, 3)).mean() for draw in range(draws)]
        return float(torch.stack(losses).mean().detach())

    assert end.trajectory == pytest.approx([value(w, 2) for w in (weights, *iterates[1::2])], rel=1e-5)
    assert end.value == pytest.approx(value(torch.stack(iterates[3:]).mean(0), 4), rel=1e-5)


def test_an_arm_that_diverges_is_said_to():
    weights = sinusoids.start(TINY)
    end = sinusoids.run(replace(TINY, lr=1e4), sinusoids.Arm("exact"), 1.0, weights)
    assert math.isnan(end.value)
    assert all(math.isfinite(value) for value in end.trajectory)


def test_the_table_and_the_figure_of_sinusoids(tmp_path):
    text = sinusoids.show(tmp_path / "floor.png", TINY)
    for name in ("exact, m = 2", "exact, m = 4", "first-order, m = 2", "moml, m = 2 + 2", "richardson, m = 2 + 2"):
        assert f"| {name} | 0.5 |" in text
    assert (tmp_path / "floor.png").read_bytes().startswith(b"\x89PNG")
