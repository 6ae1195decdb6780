"""`torch.cond` in a forward: the branch of each task, as an ``if`` in a plain loop."""

from __future__ import annotations

import pytest
import torch
from problems import assert_close, regression_batch
from slow_maml import meta_gradient_by_copies
from torch import Tensor, nn
from torch.nn import functional as F

from metamom import MAML

BATCH = regression_batch()


class Branching(nn.Module):
    """Takes the sine or the cosine, by the sign of what the weights give; as an ``if``, or by `torch.cond`."""

    def __init__(self, by_cond: bool) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.inner, self.outer = nn.Linear(2, 4).double(), nn.Linear(4, 1).double()
        nn.init.zeros_(self.inner.bias)  # so that the sign depends on the inputs
        self.by_cond = by_cond

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)
        if self.by_cond:
            return self.outer(torch.cond(h.sum() > 0, torch.sin, torch.cos, (h,)))
        return self.outer(torch.sin(h) if h.sum() > 0 else torch.cos(h))


@pytest.mark.filterwarnings("ignore:.*task by task")
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("options", [{}, {"vectorize": "loop"}, {"chunk_size": "auto"}], ids=str)
def test_each_task_takes_its_branch(options, first_order):
    estimator = "first-order" if first_order else "exact"
    model = Branching(by_cond=True)
    learner = MAML(model, F.mse_loss, inner_lr=0.1, inner_steps=2, estimator=estimator, **options)
    with torch.no_grad():
        ways = {bool(model.inner(x).sum() > 0) for x in BATCH.query_x}
    assert ways == {True, False}
    for _ in range(2):  # by the general path, and by a fast one
        truth = meta_gradient_by_copies(
            Branching(by_cond=False), F.mse_loss, BATCH, steps=2, inner_lr=0.1, first_order=first_order
        )
        found = learner.meta_gradient(BATCH).grads
        assert_close({name: grad[0] for name, grad in found.items()}, truth, 1e-10)


def test_vmap_names_torch_cond():
    learner = MAML(Branching(by_cond=True), F.mse_loss, vectorize="vmap")
    with pytest.raises(ValueError, match=r"torch.cond .* differs between tasks"):
        learner.meta_gradient(BATCH)
