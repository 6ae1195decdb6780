"""Learners that serve under `torch.inference_mode`, and data that was made there."""

from __future__ import annotations

import pytest
import torch
from problems import noise, regression_batch
from torch import nn
from torch.nn import functional as F

from metamom import MAML, TaskBatch, TopK, evaluate
from metamom.tasks import Sinusoid

BATCH = regression_batch(tasks=3)


def made_there() -> TaskBatch:
    with torch.inference_mode():
        return TaskBatch(*(x.clone() for x in BATCH[:4]))


def learner() -> MAML:
    torch.manual_seed(0)
    return MAML(nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double(), F.mse_loss, inner_steps=2)


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("batch", [BATCH, made_there()], ids=["a plain batch", "a batch made there"])
def test_everything_is_what_it_is_elsewhere(batch, mode):
    made, other = learner(), learner()
    expected = made.adapt(BATCH.support_x, BATCH.support_y)
    *_, last = made.trajectory(BATCH.support_x, BATCH.support_y, steps=2)
    report = made.backward(BATCH, bias=TopK(3))
    with torch.inference_mode(mode):
        adapted = other.adapt(batch.support_x, batch.support_y)
        predicted = other.predict(adapted, batch.query_x)
        judged, _ = other.judge(adapted, predicted, batch.query_y)
        losses = other.losses(batch)
        grads = other.meta_gradient(batch).grads
        *_, reached = other.trajectory(batch.support_x, batch.support_y, steps=2)
        assert other.backward(batch, bias=TopK(3)) == report
    assert all(torch.equal(adapted[name], w) for name, w in expected.items())
    assert all(torch.equal(reached[name], w) for name, w in last.items())
    assert torch.equal(losses, made.losses(BATCH))
    torch.testing.assert_close(judged, losses)
    assert all(torch.equal(grads[name], g) for name, g in made.meta_gradient(BATCH).grads.items())
    for p, q in zip(made.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    assert losses.requires_grad is not mode


def test_evaluations_agree():
    made = MAML(nn.Linear(1, 1), F.mse_loss)
    expected = evaluate(made, Sinusoid(), tasks=8)
    with torch.inference_mode():
        assert evaluate(made, Sinusoid(), tasks=8).mean == expected.mean


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("norm", ["batch", "frozen", "support"])
def test_normalised_images(norm, inplace):
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(inplace), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 1)
    made = MAML(nn.Sequential(*layers).double(), F.mse_loss, norm=norm)
    images, y = noise(2, 3, 1, 6, 6), noise(2, 3, 1, seed=1)
    given = {"support_x": images} if norm == "support" else {}
    expected = made.predict(made.adapt(images, y), images, **given)
    with torch.inference_mode():
        found = made.predict(made.adapt(images.clone(), y), images.clone(), **given)
        alone = made.fit_predict(images[0].clone(), y[0], images[0].clone())
    torch.testing.assert_close(found, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(alone, expected[0].detach(), rtol=1e-12, atol=1e-12)
