"""By what a compiled graph is found again: objects of any class, by identity, from any thread."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from problems import assert_close, regression_batch
from slow_maml import meta_gradient_by_copies
from torch import Tensor, nn
from torch.nn import functional as F

from metamom import MAML

BATCH = regression_batch()


@dataclass
class Weighted:
    """A loss without a hash, as dataclasses with fields that may change are."""

    factors: list[float] = field(default_factory=lambda: [2.0])

    def __call__(self, predictions: Tensor, targets: Tensor) -> Tensor:
        return self.factors[0] * F.mse_loss(predictions, targets)


@dataclass(frozen=True)
class Scaled:
    """A loss of which all objects are equal."""

    factor: float = field(compare=False)

    def __call__(self, predictions: Tensor, targets: Tensor) -> Tensor:
        return self.factor * F.mse_loss(predictions, targets)


@dataclass
class Doubling:
    """A hook without a hash."""

    by: float

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return self.by * output


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def check(learner: MAML) -> None:
    """One more meta-gradient, which is that of a plain loop."""
    truth = meta_gradient_by_copies(learner.model, learner.loss_fn, BATCH, steps=1, inner_lr=0.05)
    found = learner.meta_gradient(BATCH).grads
    assert_close({name: grad[0] for name, grad in found.items()}, truth, 1e-10)


@pytest.mark.parametrize(
    "options", [{}, {"chunk_size": "auto"}, {"compile": True}, {"compile": "auto"}, {"vectorize": "loop"}], ids=str
)
def test_a_loss_needs_no_hash(traced, options):
    check(MAML(network(), Weighted(), inner_lr=0.05, **options))


def test_losses_that_are_equal_are_told_apart(traced):
    learner = MAML(network(), Scaled(1.0), inner_lr=0.05, compile=True)
    check(learner)
    learner.loss_fn = Scaled(3.0)
    check(learner)
    assert len(traced) == 2


def test_a_hook_needs_no_hash(traced):
    model = network()
    model[1].register_forward_hook(Doubling(2.0))
    learner = MAML(model, F.mse_loss, inner_lr=0.05, compile=True)
    check(learner)
    check(learner)
    assert len(traced) == 1


def test_a_forward_that_is_replaced_on_the_object_is_compiled(traced):
    model = network()
    learner = MAML(model, F.mse_loss, inner_lr=0.05, compile=True)
    check(learner)
    model[1].forward = torch.sin
    check(learner)
    del model[1].forward
    check(learner)
    assert len(traced) == 2


def test_threads_compile_one_at_a_time(traced):
    """Tracing replaces functions of PyTorch for all threads."""
    learners = [MAML(network(), F.mse_loss, inner_lr=0.05, compile=True) for _ in range(3)]
    ready, failed = threading.Barrier(len(learners)), []

    def run(learner: MAML) -> None:
        try:
            ready.wait(60)
            check(learner)
        except BaseException as error:
            failed.append(error)
            raise

    threads = [threading.Thread(target=run, args=(learner,)) for learner in learners]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not failed
    assert len(traced) == 3
