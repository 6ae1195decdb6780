"""One learner, several threads: each gets what it would get alone."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from problems import assert_close, regression_batch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import checkpoint

from metamom import MAML, evaluate
from metamom.tasks import Sinusoid

THREADS = 4
CALLS = 12


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(2, 8)
        self.body = nn.Sequential(self.base, nn.Tanh(), nn.Dropout(0.5))
        self.head = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def in_threads(call: Any, arguments: list[Any]) -> list[Any]:
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(call, arguments))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Net().double().eval()


def test_adapting_and_predicting(model):
    learner = MAML(model, F.mse_loss, inner_lr=0.3, inner_steps=3)
    batches = [regression_batch(tasks=1 + i % 3, seed=i) for i in range(CALLS)]

    def serve(batch):
        with torch.no_grad():
            params = learner.adapt(batch.support_x, batch.support_y)
            return learner.predict(params, batch.query_x)

    expected = [serve(batch) for batch in batches]
    before = dict(model.named_parameters(remove_duplicate=False))
    for _ in range(3):
        for found, wanted in zip(in_threads(serve, batches), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    after = dict(model.named_parameters(remove_duplicate=False))
    assert all(after[name] is before[name] for name in before)


def test_two_learners_that_share_a_part_of_their_models(model):
    other = nn.Sequential(model.base, nn.ReLU(), nn.Linear(8, 1).double())
    learners = [MAML(model, F.mse_loss, inner_lr=0.3), MAML(other, F.mse_loss, inner_lr=0.3)]
    batch = regression_batch(tasks=3)
    expected = [learner.meta_gradient(batch).grads for learner in learners]
    found = in_threads(lambda i: learners[i % 2].meta_gradient(batch).grads, list(range(CALLS)))
    for i, grads in enumerate(found):
        assert_close(grads, expected[i % 2])


def test_reading_weights_while_others_predict(model):
    learner = MAML(model, F.mse_loss, inner_lr=0.3)
    batch = regression_batch(tasks=2)
    own = {id(p) for p in model.parameters()}

    def call(i: int) -> bool:
        if i % 2:
            learner.losses(batch)
            return True
        state = learner.state_dict()
        return all(type(w) is Tensor for w in state.values() if isinstance(w, Tensor)) and own == {
            id(p) for p in learner.meta_parameters().values()
        }

    assert all(in_threads(call, list(range(10 * CALLS))))


def test_evaluating_while_others_train():
    """Evaluation has dropout off, training has it on, whatever the other threads do."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 1))
    learner = MAML(model, F.mse_loss)
    expected = evaluate(learner, Sinusoid(), tasks=10, steps=(0, 1)).values
    batch = Sinusoid().sample(0, 4)
    quiet = MAML(nn.Sequential(model[0], model[1], nn.Identity(), model[3]), F.mse_loss).losses(batch).detach()

    def call(i: int) -> bool:
        if i % 2:
            return torch.equal(evaluate(learner, Sinusoid(), tasks=10, steps=(0, 1)).values, expected)
        return not torch.isclose(learner.losses(batch), quiet).any()

    assert all(in_threads(call, list(range(CALLS))))
    assert all(module.training for module in model.modules())


def switches() -> tuple[object, ...]:
    """What a model that runs task by task changes for the whole process."""
    kernels = (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled())
    return *kernels, torch._dynamo.eval_frame._stance.stance, checkpoint.CheckpointFunction.__name__


class Meeting(nn.Module):
    """A layer whose first forward waits until another thread is inside of it, or has left MAML."""

    def __init__(self, arrived: threading.Event, other: threading.Event) -> None:
        super().__init__()
        self.layer, self.arrived, self.other = nn.Linear(2, 1), arrived, other
        self.seen: list[tuple[object, ...]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.arrived.set()
        assert self.other.wait(60)
        self.seen.append(switches())
        return self.layer(x)


def test_switches_of_pytorch_are_restored_when_the_last_thread_leaves():
    """The first one in leaves before the second. Then compiled models and fast attention were off for good."""

    before = switches()
    assert before == (True, True, "default", "CheckpointFunction")
    first_in, second_in, first_out = (threading.Event() for _ in range(3))
    batch = regression_batch(tasks=1)
    first, second = Meeting(first_in, second_in).double(), Meeting(second_in, first_out).double()

    def run_first():
        MAML(first, F.mse_loss, vectorize="loop").meta_gradient(batch)
        first_out.set()

    def run_second():
        assert first_in.wait(60)
        MAML(second, F.mse_loss, vectorize="loop").meta_gradient(batch)

    with ThreadPoolExecutor(2) as pool:
        for each in [pool.submit(run_first), pool.submit(run_second)]:
            each.result(120)
    assert {*first.seen, *second.seen} == {(False, False, "force_eager", "_Direct")}
    assert switches() == before
