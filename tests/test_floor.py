"""The floors that `experiments.floor` measures are the ones that theory predicts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from metamom.experiments.floor import CURES, FIXED_POINTS, Arm, Config, predicted, report, run, squared_mean

SHORT = Config(steps=300, last=250, blocks=10)


def test_predictions_are_those_of_the_reference():
    """w_m and ||grad f(w_m)||^2 for m = 2, and first order, worked out by hand elsewhere."""
    coupled, first_order = predicted(Arm("exact", 2), 0.5), predicted(Arm("first-order", 2), 0.5)
    assert coupled.end.tolist() == pytest.approx([0.7600950118764845, 0.23990498812351543], rel=1e-12)
    assert coupled.floor == pytest.approx(0.0036560389526125426, rel=1e-12)
    assert first_order.floor == pytest.approx(0.0016282195179584122, rel=1e-12)
    assert all(predicted(cure, 0.5).floor < 1e-30 for cure in CURES)


@pytest.mark.parametrize("arm", [FIXED_POINTS[0], FIXED_POINTS[3], CURES[1]], ids=str)
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
    biased, cured = (run(SHORT, Arm("independent", 2, spec), 1.0) for spec in ("topk:1", "ef21-sgdm(0.1):topk:1"))
    assert cured.floor < 0.5 * biased.floor


def test_the_square_of_a_mean_without_bias():
    """By enumeration: over all draws of three values the estimates' mean is the square of the mean."""
    values = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 1.0]], dtype=torch.float64)
    draws = torch.cartesian_prod(*[torch.arange(3)] * 4)
    estimates = torch.tensor([squared_mean(values[draw])[0] for draw in draws], dtype=torch.float64)
    assert float(estimates.mean()) == pytest.approx(float(values.mean(0).square().sum()), rel=1e-12)
    assert squared_mean(torch.ones(5, 1, dtype=torch.float64)) == (pytest.approx(1.0), pytest.approx(0.0))


def test_report(tmp_path):
    text = report(replace(SHORT, steps=12, last=10, blocks=5, betas=(1.0,)), tmp_path).read_text(encoding="utf-8")
    assert "| exact, m = 2 | 1 |" in text
    assert "(0.7601, 0.2399)" in text
    assert (tmp_path / "figures" / "floor.png").read_bytes().startswith(b"\x89PNG")
