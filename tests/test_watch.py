"""Runs that stall or swing draw one warning with the likely cause; runs that go well draw none."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from metamom import MAML, CompositeMomentum, train
from metamom.bias.spec import parse
from metamom.tasks import LinearRegression
from metamom.tasks.linear import half_squared_error
from metamom.watch import StallWarning, Watch


def descend(
    lr: float,
    beta: float,
    *,
    steps: int = 900,
    noise: float = 0.0,
    bias: float = 0.0,
    optimizer: type = CompositeMomentum,
    operator: str = "none",
    estimator: str | None = None,
    least: float = 0.0,
) -> list[str]:
    """The warnings of a quadratic ``1/2 x^2 + 1/2 y^2 / 4`` with noise and a constant bias in its gradients."""
    curvatures = torch.tensor([1.0, 0.25], dtype=torch.float64)
    x = nn.Parameter(torch.full((2,), 3.0, dtype=torch.float64))
    made = optimizer([x], lr=lr, **({"beta": beta} if optimizer is CompositeMomentum else {}))
    watch = Watch(made, None if operator == "none" else parse(operator), estimator)
    generator = torch.Generator().manual_seed(0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            at = x.detach()
            x.grad = curvatures * at + bias + noise * torch.randn(2, generator=generator, dtype=torch.float64)
            made.step()
            watch.look(least + float(0.5 * (curvatures * at**2).sum()), float(x.grad.norm()))
    assert all(issubclass(warning.category, StallWarning) for warning in caught)
    return [str(warning.message) for warning in caught]


def test_a_run_that_goes_well_draws_nothing():
    assert descend(0.004, 0.1, noise=0.1) == []


def test_too_small_a_step():
    (message,) = descend(1e-6, 0.1)
    assert "likely cause: gamma" in message
    assert "raise gamma" in message


def test_too_large_a_step_in_noise():
    (message,) = descend(0.5, 0.5, noise=1.0)
    assert "likely cause: gamma" in message
    assert "lower gamma" in message


def test_momentum_that_swings():
    (message,) = descend(0.5, 0.002)
    assert "likely cause: beta" in message


@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_a_bias_that_cancels_the_gradient(beta):
    """It stands where the gradient is -bias, and its loss is 1/2 bias^2 (1 + 4)."""
    for biased in ({"operator": "topk:1"}, {"estimator": "first-order"}):
        (message,) = descend(0.3, beta, bias=0.5, noise=0.01, **biased)
        assert "likely cause: bias" in message


@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize("estimator", ["exact", "independent", "moml", None])
def test_a_run_at_its_best_draws_nothing(beta, estimator):
    """The loss is not zero at the minimum, and nothing is known to be biased."""
    assert descend(0.05, beta, noise=0.05, least=1.0, estimator=estimator) == []


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_healthy_training_draws_nothing(beta):
    """Linear regressions with noise in their targets: the loss ends at half its variance."""
    for estimator in ("exact", "independent", "cross-fit"):
        learner = MAML(nn.Linear(2, 1, bias=False), half_squared_error, inner_lr=0.1, estimator=estimator)
        tasks = LinearRegression(2, 5 * learner.support_parts, theta=[1.0, -2.0], noise=0.5)
        optimizer = CompositeMomentum(learner.parameters(), lr=0.1, beta=beta)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            train(learner, optimizer, tasks, iterations=410, meta_batch=4)


def test_plain_sgd_in_noise_at_too_large_a_step():
    (message,) = descend(0.5, 1.0, noise=1.0)
    assert "likely cause: gamma" in message
    assert "lower gamma" in message


def test_another_optimizer_and_normalised_steps_are_not_judged():
    assert descend(1e-6, 0.1, optimizer=torch.optim.SGD) == []
    x = nn.Parameter(torch.ones(1))
    assert not Watch(CompositeMomentum([x], lr=0.1, normalize=True), None).judges
    assert Watch(CompositeMomentum([x], lr=0.1), None).judges


@pytest.mark.parametrize(
    ("spec", "biased"),
    [
        ("topk:3", True),
        ("clip:1", True),
        ("sign:tensor", True),
        ("qsgd:4", None),
        ("ef21:topk:3", None),
    ],
)
def test_what_is_known_of_the_bias(spec, biased):
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))]
    assert Watch(CompositeMomentum(params, lr=0.1), parse(spec), "exact").biased is biased
    assert Watch(CompositeMomentum(params, lr=0.1), parse(spec), "first-order").biased is True
    assert Watch(CompositeMomentum(params, lr=0.1), None, "exact").biased is False
    assert Watch(CompositeMomentum(params, lr=0.1), None, "cross-fit").biased is None


def test_training_warns_once():
    learner = MAML(nn.Linear(2, 1, bias=False), half_squared_error, inner_lr=0.1)
    optimizer = CompositeMomentum(learner.parameters(), lr=1e-7, beta=0.1)
    tasks = LinearRegression(2, 5, theta=[1.0, -2.0])
    with pytest.warns(StallWarning, match=r"after \d+ steps: .*likely cause") as caught:
        train(learner, optimizer, tasks, iterations=900, meta_batch=64)
    assert len(caught) == 1
