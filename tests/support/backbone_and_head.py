"""ANIL on a counted backbone and a head, against a plain loop: what the tests of features share."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from as_in_a_loop import state_of
from problems import WAYS, assert_close, labelled_batch
from slow_maml import slow_meta_gradient
from torch import Tensor, nn
from torch.nn import functional as F

from metamom import MAML, TaskBatch

STEPS, ALPHA = 4, 0.3
HEAD = ("head.weight", "head.bias")


class Counted(nn.Module):
    """A layer that counts its calls in a list."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.calls: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(1)
        return self.layers(x)


class Net(nn.Module):
    """A counted backbone and a head; subclasses use them in other ways."""

    def __init__(self, *layers: nn.Module, head: nn.Module | None = None) -> None:
        super().__init__()
        self.body = Counted(nn.Linear(3, 5), *layers, nn.Tanh())
        self.head = nn.Linear(5, WAYS) if head is None else head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def batch_of(*, tasks: int = 4, support: int = 8, queries: int = 5) -> TaskBatch:
    """A batch for `Net`."""
    return labelled_batch(3, tasks=tasks, support=support, queries=queries)


def anil(model: nn.Module, **options: object) -> MAML:
    options = {"inner_lr": ALPHA, "inner_steps": STEPS, "adapt": ["head"], "chunk_size": None, **options}
    return MAML(model, F.cross_entropy, **options)


def calls_in(model: nn.Module, run: Callable[[], object]) -> int:
    """How often the backbone is called."""
    model.body.calls.clear()
    run()
    return len(model.body.calls)


def agrees(learner: MAML, batch: TaskBatch, workers: int = 1) -> None:
    """The meta-gradients of two calls, of which the first decides whether there is a head, are those of the loop."""
    before = state_of(learner.model)
    for _ in range(2):
        grads, losses = learner.meta_gradient(batch, workers)
        each = [
            slow_meta_gradient(
                copy.deepcopy(learner.model),
                learner.loss_fn,
                part,
                steps=learner.inner_steps,
                inner_lr=ALPHA,
                adapted=learner.adapted,
                learned=learner.step_sizes.learned(),
                first_order=learner.estimator == "first-order",
            )
            for part in batch.split(workers)
        ]
        for i, (expected, _) in enumerate(each):
            assert_close({n: g[i] for n, g in grads.items()}, expected, 1e-10)
        torch.testing.assert_close(losses, torch.cat([found for _, found in each]), rtol=1e-10, atol=1e-10)
    assert state_of(learner.model) == before
