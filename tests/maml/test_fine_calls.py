"""Calls that look like mistakes and must go on working."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from mistakes import Batches, Q, Returns, S, T, V, classes, classifier, embedder, flat, normal, regressor, values
from torch import Tensor, nn
from torch.distributions import Normal
from torch.nn import functional as F

from metamom import MAML, evaluate


@pytest.mark.parametrize("kind", [torch.int64, torch.int32, torch.uint8])
def test_labels_of_other_widths(kind):
    batch = classes()
    expected = classifier_of_one_seed().meta_gradient(batch)
    other = batch._replace(support_y=batch.support_y.to(kind), query_y=batch.query_y.to(kind))
    found = classifier_of_one_seed().meta_gradient(other)
    assert torch.equal(found.losses, expected.losses)
    assert classifier_of_one_seed().backward(other).metrics == classifier_of_one_seed().backward(batch).metrics


def classifier_of_one_seed() -> MAML:
    made = classifier()
    with torch.no_grad():
        for i, p in enumerate(made.parameters()):
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return made


class Casts(nn.Module):
    """A model that takes whatever comes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.float())


@pytest.mark.parametrize(
    ("learner", "batch"),
    [
        (MAML(Casts(), F.mse_loss), V._replace(support_x=V.support_x.double(), query_x=V.query_x.long())),
        (MAML(nn.Linear(1, 1).half(), F.mse_loss), V.to(dtype=torch.float16)),
        (MAML(nn.Linear(1, 1).bfloat16(), F.mse_loss), V.to(dtype=torch.bfloat16)),
        (MAML(nn.Linear(1, 1), F.mse_loss), V._replace(query_y=V.query_y.double())),
        (regressor(lambda p, y: F.mse_loss(p.squeeze(-1), y)), flat(V)),
        (regressor(lambda p, y: (p.squeeze(-1) - y).abs().mean()), flat(V)),
        (regressor(lambda p, y: F.mse_loss(p, y[:, None])), flat(V)),
        (regressor(lambda p, y: (p[:, None] - y[None]).pow(2).min(1).values.mean()), V),  # all pairs, as is meant
        (MAML(nn.Sequential(nn.Linear(1, 6), nn.Unflatten(1, (3, 2))),
              lambda p, y: ((p[:, :, None] - y[:, None]) ** 2).sum(-1).min(-1).values.mean()),  # between sets of points
         V._replace(support_y=normal(T, S, 7, 2), query_y=normal(T, Q, 7, 2))),
        (MAML(nn.Sequential(nn.Linear(1, 6), nn.Unflatten(1, (3, 2))),
              lambda p, y: (p.unsqueeze(2).expand(-1, -1, 7, -1) - y.unsqueeze(1)).square().sum(-1).mean()),
         V._replace(support_y=normal(T, S, 7, 2), query_y=normal(T, Q, 7, 2))),
        (MAML(nn.Linear(1, 4), lambda p, y: (p - y).abs().mean() - (p[:, :, None] - p[:, None]).abs().mean()), V),
        (MAML(nn.Linear(1, 2), lambda p, y: -Normal(p[:, :1], p[:, 1:].exp()).log_prob(y).mean()), V),
        (regressor(lambda p, y: F.mse_loss(p.expand_as(y), y)),
         V._replace(support_y=normal(T, S, 2), query_y=normal(T, Q, 2))),  # one prediction of several targets
        (regressor(lambda p, y: ((p[1:] - p[:-1]) - (y[1:] - y[:-1])).abs().mean()), V),
        (regressor(lambda p, y: F.relu(1 - (p - p.T) * (y - y.T).sign()).mean()), V),  # ranks
        (regressor(lambda p, y: (p - p.mean(0)).pow(2).mean() + F.mse_loss(p.squeeze(-1), y)), flat(V)),
        (MAML(nn.Linear(1, 3), lambda p, y: torch.maximum(0.1 * (y - p), 0.9 * (p - y)).mean()), V),  # 3 quantiles
        (classifier(5), classes(3)),  # more outputs than ways
        (embedder(), V._replace(support_x=torch.full((T, S, 1), 9), query_x=torch.zeros(T, Q, 1).int())),
        (regressor(), values(support=1, query=1)),
        (regressor(), values(tasks=1)),
        (regressor(), V._replace(task_ids=torch.tensor([3, 3, 3, 3]))),
        (MAML(nn.Sequential(nn.Linear(1, 4), nn.Linear(4, 1).requires_grad_(False)), F.mse_loss), V),
        (regressor(inner_steps=np.int64(2), inner_lr=np.float32(0.1)), V),
        (classifier(loss_fn=nn.CrossEntropyLoss(weight=torch.ones(3))), classes()),
    ],
)  # fmt: skip
def test_calls_that_are_fine(learner, batch):
    assert math.isfinite(learner.backward(batch).loss)


def test_a_loss_that_changes_is_watched_where_it_fails():
    """It runs as it is once it has been found fine."""

    def loss_fn(p: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(p, y) if not late else F.gaussian_nll_loss(p, y, torch.ones_like(p))

    late, learner = False, regressor(loss_fn)
    first = learner.losses(V)
    assert torch.equal(learner.losses(V), first)
    late = True
    assert math.isfinite(learner.backward(V).loss)


def test_outputs_that_the_loss_takes_apart_have_losses():
    learner = MAML(Returns(lambda out: {"logits": out}), lambda out, y: F.mse_loss(out["logits"], y))
    plain = MAML(learner.model.layer, F.mse_loss)
    torch.testing.assert_close(learner.losses(V), plain.losses(V))
    assert set(learner.predict(learner.adapt(V.support_x, V.support_y), V.query_x)) == {"logits"}
    ours, theirs = (evaluate(each, Batches(V), tasks=T, steps=(0, 1)) for each in (learner, plain))
    torch.testing.assert_close(ours.values, theirs.values)


def test_whole_numbers_of_numpy():
    learner = regressor()
    assert torch.equal(
        learner.meta_gradient(V, workers=np.int64(2)).grads["0.bias"],
        learner.meta_gradient(V, workers=2).grads["0.bias"],
    )
    learner.backward(V, workers=np.int32(2))
    adapted = learner.adapt(V.support_x, V.support_y, steps=np.int64(2))
    assert learner.predict(adapted, V.query_x).shape == (T, Q, 1)
    assert evaluate(learner, Batches(V), tasks=np.int64(T), steps=np.arange(2)).steps == (0, 1)


def test_no_step_needs_no_points():
    learner = regressor()
    adapted = learner.adapt(V.support_x[:, :0], V.support_y[:, :0], steps=0)
    torch.testing.assert_close(learner.predict(adapted, V.query_x), learner.model(V.query_x))
