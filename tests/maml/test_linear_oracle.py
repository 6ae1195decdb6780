"""Linear regression on a finite data set: meta-gradients known in closed form and by enumeration."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metamom import MAML, TaskBatch

# Linear regression on a finite data set: y = (1, 0, 2, 1), loss 1/2 mean, alpha = 0.1, w = (1/2, -1/2).
FEATURES = [(1.0, 0.0), (1.0, 1.0), (0.0, 2.0), (-1.0, 1.0)]


TARGETS = [1.0, 0.0, 2.0, 1.0]


POPULATION = {1: (0.320859375, -1.445), 2: (0.274535302734375, -1.0440125)}


def half_mean_square(predictions: Tensor, targets: Tensor) -> Tensor:
    return 0.5 * F.mse_loss(predictions, targets)


def linear_learner(steps: int = 1, estimator: str = "exact") -> MAML:
    model = nn.Linear(2, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.5, -0.5]]))
    return MAML(model, half_mean_square, inner_lr=0.1, inner_steps=steps, estimator=estimator)


def chosen(pairs: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> TaskBatch:
    """One task for each (support indices, query indices) into the data set."""
    x = torch.tensor(FEATURES, dtype=torch.float64)
    y = torch.tensor(TARGETS, dtype=torch.float64).unsqueeze(-1)
    inner, outer = torch.tensor([a for a, _ in pairs]), torch.tensor([b for _, b in pairs])
    return TaskBatch(x[inner], y[inner], x[outer], y[outer])


ALL = (0, 1, 2, 3)


WITH_REPLACEMENT = {
    (1, 1): (0.3290625, -1.50125),
    (2, 1): (0.3249609375, -1.473125),
    (3, 1): (0.32359375, -1.46375),
    (1, 2): (0.306815625, -1.27185),
    (2, 2): (0.29076181640625, -1.163201171875),
}


@pytest.mark.parametrize("steps", POPULATION)
def test_population_gradient_of_linear_regression(steps):
    grads, _ = linear_learner(steps).meta_gradient(chosen([(ALL, ALL)]))
    assert grads["weight"].flatten().tolist() == pytest.approx(POPULATION[steps], abs=1e-12)


def test_first_order_gradient_of_linear_regression():
    """Sigma (I - alpha Sigma) (w - theta) with Sigma = diag(3/4, 3/2), theta = (0, 5/6)."""
    grads, _ = linear_learner(estimator="first-order").meta_gradient(chosen([(ALL, ALL)]))
    assert grads["weight"].flatten().tolist() == pytest.approx((0.346875, -1.7), abs=1e-12)


@pytest.mark.parametrize(("m", "steps"), WITH_REPLACEMENT)
def test_mean_over_all_batches_with_replacement(m, steps):
    batch = chosen([(inner, ALL) for inner in itertools.product(ALL, repeat=m)])
    grads, _ = linear_learner(steps).meta_gradient(batch)
    assert grads["weight"].flatten().tolist() == pytest.approx(WITH_REPLACEMENT[m, steps], abs=1e-12)


@pytest.mark.parametrize(
    ("m", "expected"), [(1, (0.3290625, -1.50125)), (2, (0.32359375, -1.46375)), (3, (0.3217708333333333, -1.45125))]
)
def test_mean_over_all_batches_without_replacement(m, expected):
    batch = chosen([(inner, ALL) for inner in itertools.combinations(ALL, m)])
    grads, _ = linear_learner().meta_gradient(batch)
    assert grads["weight"].flatten().tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("m", "expected"), [(1, (0.21875, -0.86)), (2, (0.269453125, -1.1415625))])
def test_mean_over_all_batches_that_serve_as_support_and_query(m, expected):
    batch = chosen([(points, points) for points in itertools.product(ALL, repeat=m)])
    grads, _ = linear_learner().meta_gradient(batch)
    assert grads["weight"].flatten().tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("m", "expected"), [(1, 4.855089849853515), (2, 2.305785711669921)])
def test_mean_square_error_over_all_batches(m, expected):
    """One worker a task, so that every single estimate is seen."""
    batches = list(itertools.product(ALL, repeat=m))
    batch = chosen(list(itertools.product(batches, batches)))
    grads, _ = linear_learner().meta_gradient(batch, workers=batch.num_tasks)
    errors = grads["weight"].flatten(1) - torch.tensor(POPULATION[1], dtype=torch.float64)
    assert float(errors.square().sum(1).mean()) == pytest.approx(expected, abs=1e-12)
