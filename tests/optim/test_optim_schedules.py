"""Learning rates and betas that are scheduled."""

from __future__ import annotations

import io
import math

import pytest
import torch
from optimizers import assert_same, make_params, run, scalar, set_gradients, step_once
from torch.optim import lr_scheduler

from metamom import CompositeMomentum, LambdaBeta

SCHEDULERS = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3, 0.5),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 20),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda k: k / 10),  # a warm-up from zero
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=20, cycle_momentum=False),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_learning_rate_schedulers(name):
    def scheduled(make):
        params = make_params()
        optimizer = make(params)
        scheduler = SCHEDULERS[name](optimizer)
        trace, lrs = [], set()
        for step in range(20):
            set_gradients(params, step)
            optimizer.step()
            trace.append([p.detach().clone() for p in params])
            lrs.add(optimizer.param_groups[0]["lr"])
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
        assert len(lrs) > 2
        return trace

    ours = scheduled(lambda p: CompositeMomentum(p, 0.02, 0.1, first_step="gradient"))
    assert_same(ours, scheduled(lambda p: torch.optim.SGD(p, 0.02, momentum=0.9, dampening=0.9)))


def test_learning_rate_may_be_a_tensor():
    lr = torch.tensor(0.02)
    number = run(lambda p: CompositeMomentum(p, float(lr)), 10)
    assert_same(run(lambda p: CompositeMomentum(p, lr.clone()), 10), number)
    optimizer = CompositeMomentum([w := scalar(1.0)], lr=torch.tensor(0.5), beta=1.0)
    scheduler = lr_scheduler.StepLR(optimizer, 1, 0.5)
    step_once(optimizer, 1.0)
    scheduler.step()
    step_once(optimizer, 1.0)
    assert w.item() == 1 - 0.5 - 0.25


def test_lambda_beta_schedules_each_group():
    optimizer = CompositeMomentum([{"params": [scalar()]}, {"params": [scalar()], "beta": 0.4}], lr=0.1, beta=0.8)
    schedule = LambdaBeta(optimizer, [lambda k: 1 / (1 + k), lambda k: 0.5**k])
    seen = [schedule.get_last_beta()]
    for _ in range(3):
        step_once(optimizer, 1.0)
        schedule.step()
        seen.append([group["beta"] for group in optimizer.param_groups])
    expected = [[0.8, 0.4], [0.4, 0.2], [0.8 / 3, 0.1], [0.2, 0.05]]
    assert [b for row in seen for b in row] == pytest.approx([b for row in expected for b in row])


def test_scheduled_betas_are_the_ones_used():
    optimizer = CompositeMomentum([w := scalar(0.0)], lr=1.0, beta=0.8)
    schedule = LambdaBeta(optimizer, lambda k: 0.5**k)
    v = expected = 0.0
    for k, g in enumerate([1.0, -2.0, 3.0]):
        step_once(optimizer, g)
        schedule.step()
        beta = 0.8 * 0.5**k
        v = (1 - beta) * v + beta * g
        expected -= v
    assert w.item() == pytest.approx(expected, abs=1e-14)


def test_lambda_beta_state_dict():
    optimizer = CompositeMomentum([scalar()], lr=0.1, beta=0.8)
    schedule = LambdaBeta(optimizer, lambda k: 1 / (1 + k))
    for _ in range(3):
        schedule.step()
    file = io.BytesIO()
    torch.save(schedule.state_dict(), file)
    file.seek(0)
    other = CompositeMomentum([scalar()], lr=0.1, beta=0.3)
    resumed = LambdaBeta(other, lambda k: 1 / (1 + k))
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert other.param_groups[0]["beta"] == optimizer.param_groups[0]["beta"] == pytest.approx(0.2)
    schedule.step()
    resumed.step()
    assert resumed.get_last_beta() == schedule.get_last_beta() == pytest.approx([0.16])


def test_lambda_beta_errors():
    with pytest.raises(TypeError, match="LambdaBeta needs an optimizer with a beta; got SGD"):
        LambdaBeta(torch.optim.SGD([scalar()], lr=0.1), lambda k: 1.0)
    optimizer = CompositeMomentum([scalar()], lr=0.1, beta=0.5)
    with pytest.raises(ValueError, match="one for each of the 1 groups; got 2"):
        LambdaBeta(optimizer, [lambda k: 1.0] * 2)
    for factor in (0.0, 3.0, math.nan):
        with pytest.raises(ValueError, match=r"must be in \(0, 1\]"):
            LambdaBeta(optimizer, lambda k, factor=factor: factor)
    schedule = LambdaBeta(optimizer, lambda k: 1.0 - k)
    with pytest.raises(ValueError, match=r"must be in \(0, 1\]; got 0"):
        schedule.step()
    assert optimizer.param_groups[0]["beta"] == 0.5
