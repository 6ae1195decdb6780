"""Class labels that are not integers: every method says which integers were wanted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from metamom import MAML, TaskBatch, evaluate

WAYS = 5
X = torch.randn(2, WAYS, 3, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(WAYS).repeat(2, 1)
WRONG = {"y.long()": LABELS.float(), "y.squeeze(-1).long()": LABELS.float().unsqueeze(-1)}


class Given:
    """A sampler of one batch."""

    def __init__(self, batch: TaskBatch) -> None:
        self.batch = batch

    def sample(self, step: int, num_tasks: int) -> TaskBatch:
        return self.batch


def of_queries(y: torch.Tensor) -> TaskBatch:
    return TaskBatch(X, LABELS, X, y)


CALLS: dict[str, Any] = {
    "fit": lambda learner, y: learner.fit(X[0], y[0]),
    "fit_predict": lambda learner, y: learner.fit_predict(X[0], y[0], X[0]),
    "adapt": lambda learner, y: learner.adapt(X, y),
    "losses": lambda learner, y: learner.losses(of_queries(y)),
    "backward": lambda learner, y: learner.backward(of_queries(y)),
    "evaluate": lambda learner, y: evaluate(learner, Given(of_queries(y)), tasks=2, steps=(1,)),
    "evaluate, support": lambda learner, y: evaluate(learner, Given(TaskBatch(X, y, X, LABELS)), tasks=2, steps=(1,)),
}


@pytest.mark.parametrize("cure", WRONG)
@pytest.mark.parametrize("call", CALLS)
def test_class_labels_that_are_not_integers(call, cure):
    learner = MAML(nn.Linear(3, WAYS), F.cross_entropy)
    with pytest.raises(ValueError, match="loss_fn cannot take predictions of shape") as caught:
        CALLS[call](learner, WRONG[cure])
    said = str(caught.value)
    assert said.endswith(f"If targets are class indices, make them integers: {cure}, in 0..ways-1 (here 0..4).")
    assert "gather" not in said
    assert "multi-target" not in said
    CALLS[call](learner, LABELS)


@pytest.mark.parametrize("ignored", [-100, 3])
def test_labels_that_are_all_ignored(ignored):
    loss = nn.CrossEntropyLoss(ignore_index=ignored)
    learner = MAML(nn.Linear(3, WAYS), loss)
    y = torch.full((WAYS,), ignored)
    for call in (learner.fit, lambda x, y: learner.fit_predict(x, y, x)):
        with pytest.raises(ValueError, match=f"all labels are {ignored}, which the loss ignores"):
            call(X[0], y)
    y[0] = 0
    learner.fit(X[0], y)
