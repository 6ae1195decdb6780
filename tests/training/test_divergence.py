"""Losses, gradients and weights that are not finite."""

from __future__ import annotations

import math

import pytest
import torch
from endings import newest
from torch.optim import SGD
from training_runs import AtStep, Parts, go, learner, momentum

from metamom import (
    MAML,
    DivergedError,
    RandK,
    TopK,
)
from metamom.bias import EF21, NonFiniteError
from metamom.nets.models import SinusoidMLP
from metamom.training.directory import read_metrics

pytestmark = pytest.mark.usefixtures("global_state")


@pytest.mark.parametrize(
    ("action", "what"),
    [
        (lambda batch: batch._replace(query_y=batch.query_y + 1e30), "the loss"),
        (lambda batch: batch._replace(support_y=batch.support_y * 1e37), "the loss"),
    ],
)
def test_loss_that_is_not_finite(action, what, tmp_path):
    with pytest.raises(DivergedError, match=rf"{what} is not finite at step 6\. Try a smaller lr, .*Clip") as caught:
        go(momentum(), tmp_path, tasks=AtStep(6, action))
    assert caught.value.step == 6
    state = newest(tmp_path)
    assert state["step"] == 4
    assert all(w.isfinite().all() for w in state["learner"].values())
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(6))
    assert go(momentum(), tmp_path, resume=True).resumed_from == 4  # with better tasks


def test_gradient_that_is_not_finite():
    """The loss, sqrt at 0, is finite and its slope is not."""
    made = MAML(
        SinusoidMLP((8,), generator=torch.Generator().manual_seed(0)),
        lambda predictions, y: (predictions * 0).abs().sqrt().sum(),
        estimator="first-order",
    )
    with pytest.raises(DivergedError, match="is not finite at step 0"):
        go(Parts(made, SGD(made.parameters(), lr=0.1)))


@pytest.mark.parametrize("bias", [TopK(3), RandK(3), EF21(TopK(3)), lambda g: g])
def test_gradient_that_an_operator_refuses(bias):
    """The step is named, and why."""
    made = MAML(
        SinusoidMLP((8,), generator=torch.Generator().manual_seed(0)),
        lambda predictions, y: (predictions * 0).abs().sqrt().sum(),
        estimator="first-order",
    )
    with pytest.raises(DivergedError, match="a worker's gradient is not finite at step 0") as caught:
        go(Parts(made, SGD(made.parameters(), lr=0.1)), workers=2, bias=bias)
    assert caught.value.step == 0
    assert isinstance(caught.value.__cause__, NonFiniteError)


def test_step_size_that_diverges(tmp_path):
    with pytest.raises(DivergedError) as caught:
        go(momentum(lr=1e12), tmp_path)
    assert 0 < caught.value.step < 12
    assert all(w.isfinite().all() for w in newest(tmp_path)["learner"].values())


def test_weight_that_is_not_finite_is_never_saved(tmp_path):
    class Overflowing(SGD):
        def step(self, closure=None):
            super().step(closure)
            self.param_groups[0]["params"][0].data[0] = math.inf

    made = learner()
    with pytest.raises(DivergedError, match="a weight is not finite"):
        go(Parts(made, Overflowing(made.parameters(), lr=0.01)), tmp_path, checkpoint_every=1)
    assert newest(tmp_path)["step"] == 0
    assert all(w.isfinite().all() for w in newest(tmp_path)["learner"].values())
