"""Models that return objects of `torch.distributions`, with losses that ask for likelihoods: as in a plain loop."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from as_in_a_loop import Given
from problems import assert_close, generator
from slow_maml import slow_meta_gradient
from torch import Tensor, nn
from torch import distributions as D
from torch.nn import functional as F

from metamom import MAML, TaskBatch, evaluate, pad

TASKS, INNER_LR = 3, 0.05


class Head(nn.Module):
    """A distribution made of ``out`` numbers for each point."""

    def __init__(self, make: Callable[[Tensor], Any], out: int) -> None:
        super().__init__()
        self.make, self.body = make, nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, out))

    def forward(self, x: Tensor) -> Any:
        return self.make(self.body(x))


def halves(h: Tensor) -> tuple[Tensor, Tensor]:
    mean, scale = h.chunk(2, -1)
    return mean, F.softplus(scale)


EYE = torch.eye(2, dtype=torch.float64)
CASES: dict[str, tuple[Callable[[Tensor], Any], int, str]] = {
    "normal": (lambda h: D.Normal(*halves(h)), 2, "real"),
    "normal, unchecked": (lambda h: D.Normal(*halves(h), validate_args=False), 2, "real"),
    "normal of one scale": (lambda h: D.Normal(h, 0.5), 1, "real"),
    "categorical": (lambda h: D.Categorical(logits=h), 3, "class"),
    "independent": (lambda h: D.Independent(D.Normal(*halves(h)), 1), 4, "pair"),
    "correlated": (lambda h: D.MultivariateNormal(h, EYE + 0.3), 2, "pair"),
    "mixture": (
        lambda h: D.MixtureSameFamily(D.Categorical(logits=h[..., :2]), D.Normal(h[..., 2:4], F.softplus(h[..., 4:6]))),
        6,
        "flat",
    ),
    "log-normal": (lambda h: D.LogNormal(*halves(h)), 2, "positive"),
    "transformed": (
        lambda h: D.TransformedDistribution(D.Normal(*halves(h)), [D.AffineTransform(0.5, 2.0), D.TanhTransform()]),
        2,
        "unit",
    ),
    "Poisson": (lambda h: D.Poisson(h.exp()), 1, "count"),
    "beta": (lambda h: D.Beta(*map(F.softplus, h.chunk(2, -1))), 2, "unit"),
    "in a dict": (lambda h: {"distribution": D.Normal(*halves(h)), "scores": h}, 2, "real"),
    "in a tuple": (lambda h: (D.Normal(*halves(h)), D.Bernoulli(logits=h[..., :1])), 2, "real"),
}
NOT_ONE = {"correlated"}  # of several tasks


def unlikely(out: Any, y: Tensor) -> Tensor:
    """The negative log likelihood."""
    if isinstance(out, dict):
        out = out["distribution"]
    if isinstance(out, tuple):
        return -out[0].log_prob(y).mean() - out[1].log_prob((y > 0).double()).mean()
    return -out.log_prob(y).mean()


def case(name: str) -> tuple[nn.Module, TaskBatch]:
    make, out, kind = CASES[name]
    draw = generator(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(TASKS, 10, *shape, generator=draw, dtype=torch.float64)

    targets: dict[str, Callable[[], Tensor]] = {
        "real": lambda: normal(1),
        "flat": lambda: normal(),
        "pair": lambda: normal(2),
        "positive": lambda: normal(1).exp(),
        "unit": lambda: normal(1).sigmoid(),
        "count": lambda: normal(1).exp().round(),
        "class": lambda: torch.randint(0, 3, (TASKS, 10), generator=draw),
    }
    torch.manual_seed(0)
    model, x, y = Head(make, out).double(), normal(4), targets[kind]()
    return model, TaskBatch(x[:, :6], y[:, :6], x[:, 6:], y[:, 6:])


@pytest.mark.parametrize("vectorize", ["auto", "loop"])
@pytest.mark.parametrize("name", CASES)
def test_meta_gradients_and_evaluations_are_those_of_a_plain_loop(name, vectorize):
    model, batch = case(name)
    learner = MAML(model, unlikely, inner_lr=INNER_LR, inner_steps=2, vectorize=vectorize)
    expected, losses = slow_meta_gradient(model, unlikely, batch, steps=2, inner_lr=INNER_LR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some may run task by task
        for _ in range(2):
            found = learner.meta_gradient(batch)
            torch.testing.assert_close(found.losses, losses, rtol=1e-9, atol=1e-9)
            assert_close({key: grad[0] for key, grad in found.grads.items()}, expected, 1e-9)
        result = evaluate(learner, Given(batch), tasks=TASKS, steps=(2,))
    assert result.metric == "loss"
    torch.testing.assert_close(result.values[0].double(), losses, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in CASES if name not in NOT_ONE])
def test_predictions_of_several_tasks_are_one_distribution(name):
    model, batch = case(name)
    learner = MAML(model, unlikely, inner_lr=INNER_LR)
    adapted = learner.adapt(batch.support_x, batch.support_y)
    found = learner.predict(adapted, batch.query_x)
    losses = learner.losses(batch)
    torch.testing.assert_close(learner.judge(adapted, found, batch.query_y)[0], losses)
    torch.testing.assert_close(unlikely(found, batch.query_y), losses.mean())
    one = learner.fit_predict(batch.support_x[0], batch.support_y[0], batch.query_x[0])
    torch.testing.assert_close(unlikely(one, batch.query_y[0]), losses[0].detach())


def test_parameters_that_points_share_are_not_one_distribution():
    model, batch = case("correlated")
    learner = MAML(model, unlikely)
    adapted = learner.adapt(batch.support_x, batch.support_y)
    with pytest.raises(TypeError, match=r"MultivariateNormal with parameters that several points share.*expand them"):
        learner.predict(adapted, batch.query_x)


def test_ragged_tasks():
    model, batch = case("independent")
    tasks = [tuple(field[t][: 4 - t] for field in batch[:4]) for t in range(TASKS)]
    found = MAML(model, unlikely, inner_lr=INNER_LR).losses(pad(tasks))
    for t, task in enumerate(tasks):
        alone = TaskBatch(*(each.unsqueeze(0) for each in task))
        _, expected = slow_meta_gradient(model, unlikely, alone, inner_lr=INNER_LR)
        torch.testing.assert_close(found[t].detach(), expected[0])


@pytest.mark.parametrize("vectorize", ["auto", "loop"])
def test_parameters_out_of_range_are_refused(vectorize):
    model, batch = Head(lambda h: D.Normal(h, -torch.ones_like(h), validate_args=True), 1).double(), case("normal")[1]
    with pytest.raises(ValueError, match="scale"):
        MAML(model, unlikely, vectorize=vectorize).backward(batch)
