"""Public reports about meta-gradients that were none, or of the first order: here they are exact.

The table of all reports is in ``tests/test_bugs_of_the_field.py``.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metamom import MAML, CompositeMomentum, TaskBatch
from metamom.maml.estimators import Estimator


def one_weight() -> tuple[nn.Linear, TaskBatch]:
    """y = w x with w = 0.5, and the point (1, 1) for support and query, as in higher 69."""
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(model.weight, 0.5)
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    return model, TaskBatch(one, one, one, one)


# The loss is (w - 1)², so u_J - 1 = 0.8^J (w - 1) with a step size of 0.1: u_1 = 0.6. The derivative of the query loss
# is 2 (u_J - 1) in u_J, and 0.8^J times that in w.
GRADIENTS: dict[tuple[Estimator, int], float] = {
    ("exact", 1): 2 * -0.4 * 0.8,
    ("first-order", 1): 2 * -0.4,
    ("exact", 3): 2 * -0.256 * 0.8**3,
    ("first-order", 3): 2 * -0.256,
}


@pytest.mark.parametrize(("estimator", "steps"), GRADIENTS)
def test_the_gradient_in_the_initial_weight(estimator, steps):
    """higher 69: it was None; pytorch/benchmark PR 349, MAML-Pytorch 26: it was of the first order, silently."""
    model, batch = one_weight()
    learner = MAML(model, F.mse_loss, inner_lr=0.1, inner_steps=steps, estimator=estimator)
    learner.backward(batch)
    assert model.weight.grad is not None
    assert model.weight.grad.item() == pytest.approx(GRADIENTS[estimator, steps], rel=1e-12)


def test_the_weight_moves_with_the_optimizer():
    """higher 69: after ``optimizer.step()``, the parameter still was 0.5."""
    model, batch = one_weight()
    learner = MAML(model, F.mse_loss, inner_lr=0.1)
    optimizer = CompositeMomentum(learner.parameters(), lr=0.1, beta=1.0)
    learner.backward(batch)
    optimizer.step()
    assert model.weight.item() == pytest.approx(0.5 + 0.1 * 0.64, rel=1e-12)


class Proposal(nn.Module):
    """Mean and variance of a normal distribution, which no input changes."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.variance = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.mean, self.variance])


def test_the_loss_after_adaptation_is_that_of_the_adapted_weights():
    """learn2learn 420: the loss was the same before and after `adapt`, since it was of the old parameters.

    The loss is (μ - m)² + (σ - v)²: one step of 0.25 halves the distance, so a quarter of the loss is left.
    """
    model = Proposal().double()
    targets = torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    learner = MAML(model, nn.MSELoss(reduction="sum"), inner_lr=0.25)
    nothing = torch.zeros(3, 2, 1, dtype=torch.float64)
    batch = TaskBatch(nothing, targets, nothing, targets)
    before = (targets - torch.tensor([[0.0], [1.0]])).square().sum((1, 2))
    torch.testing.assert_close(learner.losses(batch), before / 4)
    adapted = learner.adapt(batch.support_x, batch.support_y)
    torch.testing.assert_close(adapted["mean"], targets[:, 0] / 2)
    torch.testing.assert_close(adapted["variance"], (1 + targets[:, 1]) / 2)
    assert model.mean.tolist() == [0.0, 0.0]
