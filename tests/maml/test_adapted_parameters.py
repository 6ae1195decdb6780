"""Which parameters are adapted: any name, ANIL, frozen, tied."""

from __future__ import annotations

import pytest
import torch
from problems import (
    assert_close,
    mean_over_workers,
    problem,
    randomised,
    regression_batch,
)
from slow_maml import slow_meta_gradient
from torch import Tensor, nn
from torch.nn import functional as F

from metamom import MAML


@pytest.mark.parametrize("reserved", ["shared", "fixed", "training", "all", "alpha"])
def test_a_parameter_may_have_any_name(reserved):
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_parameter(reserved if reserved != "training" else "train_", nn.Parameter(torch.ones(1, 1)))

        def forward(self, x: Tensor) -> Tensor:
            return x @ next(self.parameters())

    learner = MAML(Named(), F.mse_loss, learn_inner_lr=True)
    grads, _ = learner.meta_gradient(regression_batch(dim=1).to(dtype=torch.float32))
    assert len(grads) == 2


@pytest.mark.parametrize(
    "adapt",
    [["head"], "head", ["head.weight", "head.bias"], lambda name: name.startswith("head")],
    ids=["module", "string", "names", "predicate"],
)
@pytest.mark.parametrize("learn", [False, "tensor"])
@pytest.mark.parametrize("workers", [1, 2])
def test_anil(adapt, learn, workers):
    model, loss_fn, batch = problem("GroupNorm")
    learner = MAML(model, loss_fn, inner_lr=0.2, inner_steps=3, adapt=adapt, learn_inner_lr=learn)
    assert learner.adapted == ("head.weight", "head.bias")
    grads, _ = learner.meta_gradient(batch, workers)
    for i, part in enumerate(batch.split(workers)):
        expected, _ = slow_meta_gradient(
            model,
            loss_fn,
            part,
            steps=3,
            inner_lr=0.2,
            adapted=learner.adapted,
            learned=learner.step_sizes.learned(),
        )
        assert_close({n: g[i] for n, g in grads.items()}, expected)
    assert set(learner.adapt(batch.support_x, batch.support_y)) == set(learner.adapted)


@pytest.mark.parametrize("workers", [1, 4])
def test_frozen_parameters_stay_and_get_no_gradient(workers):
    model, loss_fn, batch = problem("MLP")
    model[0].weight.requires_grad_(False)
    learner = MAML(model, loss_fn, inner_lr=0.05, inner_steps=2)
    grads, _ = learner.meta_gradient(batch, workers)
    expected, _ = slow_meta_gradient(model, loss_fn, batch, steps=2, inner_lr=0.05)
    assert "0.weight" not in grads
    assert_close(mean_over_workers(grads), expected)
    learner.backward(batch)
    assert model[0].weight.grad is None


def test_tied_parameters_move_together():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)
            self.b.weight = self.a.weight
            self.out = nn.Linear(2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.tanh(self.b(torch.tanh(self.a(x)))))

    class Explicit(nn.Module):
        """The same with the shared matrix written out, so that nothing is left to the tying."""

        def __init__(self) -> None:
            super().__init__()
            self.w, self.a, self.b = (nn.Parameter(torch.empty(s)) for s in ((2, 2), 2, 2))
            self.out = nn.Linear(2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.tanh(F.linear(torch.tanh(F.linear(x, self.w, self.a)), self.w, self.b)))

    tied, explicit = randomised(Tied()), randomised(Explicit())
    with torch.no_grad():
        for p, q in zip(tied.parameters(), explicit.parameters(), strict=True):
            assert p.shape == q.shape
            q.copy_(p)
    batch = regression_batch()
    grads, _ = MAML(tied, F.mse_loss, inner_lr=0.1, inner_steps=3).meta_gradient(batch, 2)
    expected, _ = slow_meta_gradient(explicit, F.mse_loss, batch, steps=3, inner_lr=0.1)
    assert_close(dict(zip(expected, mean_over_workers(grads).values(), strict=True)), expected)
