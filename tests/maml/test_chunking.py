"""How many tasks are computed at a time: spans, and the size that "auto" measures."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import mlp, regression_batch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

import metamom.maml.chunking
import metamom.maml.gradient
from metamom import MAML, TaskBatch
from metamom.maml.chunking import PEAK, spans, tasks_within_budget
from metamom.nets.models import Conv4
from metamom.tasks import Sinusoid


@given(workers=st.integers(1, 6), per_worker=st.integers(1, 40), chunk_size=st.none() | st.integers(1, 300))
@settings(deadline=None)
def test_spans(workers, per_worker, chunk_size):
    tasks = workers * per_worker
    cut = list(spans(tasks, chunk_size, per_worker))
    assert cut[0][0] == 0
    assert cut[-1][1] == tasks
    assert all(stop == start for (_, stop), (start, _) in itertools.pairwise(cut))
    lengths = [stop - start for start, stop in cut]
    assert min(lengths) >= 1
    size = tasks if chunk_size is None else chunk_size
    assert max(lengths) <= size
    if size >= per_worker:  # whole workers
        assert all(start % per_worker == 0 == stop % per_worker for start, stop in cut)
        whole, unit, parts = workers, per_worker, 1
    else:  # within one worker
        assert all(start // per_worker == (stop - 1) // per_worker for start, stop in cut)
        whole, unit, parts = per_worker, 1, workers
    # the fewest that there can be; their longest as short as that allows; all equal but the last of each part
    fewest = -(-whole // (size // unit))
    assert len(cut) == fewest * parts
    assert max(lengths) == -(-whole // fewest) * unit
    assert len(set(lengths)) <= 2
    ends = set(range(fewest - 1, len(cut), fewest))
    assert {length for i, length in enumerate(lengths) if i not in ends} <= {max(lengths)}


@pytest.mark.parametrize(
    ("tasks", "chunk_size", "per_worker", "expected"),
    [
        (6, None, 6, [(0, 6)]),
        (6, 100, 3, [(0, 6)]),
        (6, 4, 6, [(0, 3), (3, 6)]),
        (6, 4, 3, [(0, 3), (3, 6)]),
        (6, 2, 3, [(0, 2), (2, 3), (3, 5), (5, 6)]),
        (10, 4, 10, [(0, 4), (4, 8), (8, 10)]),
        (8, 5, 2, [(0, 4), (4, 8)]),
    ],
)
def test_examples_of_spans(tasks, chunk_size, per_worker, expected):
    assert list(spans(tasks, chunk_size, per_worker)) == expected


def batch(tasks: int = 6, points: int = 5) -> TaskBatch:
    sizes = [(tasks, points, 2), (tasks, points, 1)] * 2
    generator = torch.Generator().manual_seed(0)
    return TaskBatch(*(torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes))


def learner(**options: Any) -> MAML:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 1)).double()
    return MAML(model, F.mse_loss, inner_lr=0.05, inner_steps=2, **options)


@pytest.fixture(autouse=True)
def generator_of_the_others() -> Any:
    with torch.random.fork_rng():
        yield


def chosen(learner: MAML, batch: TaskBatch) -> int | None:
    """The number of tasks at a time that a learner chooses for a batch."""
    return learner._gradients.chunk_size(learner._plan(), batch)


@pytest.fixture
def sizes(monkeypatch) -> list[int]:
    """The number of tasks of every chunk that is computed, those of measuring among them."""
    seen: list[int] = []
    gradient = metamom.maml.gradient.chunk_gradient

    def noting(*args: Any) -> Any:
        seen.append(args[-1].shape[0])
        return gradient(*args)

    monkeypatch.setattr(metamom.maml.gradient, "chunk_gradient", noting)
    return seen


@pytest.fixture
def needed(monkeypatch) -> int:
    """The estimated bytes that one task of `batch` needs: a share of a budget that fits very many."""
    budget = 2**40
    monkeypatch.setattr(metamom.maml.chunking, "BUDGET", budget)
    return budget // chosen(learner(chunk_size="auto"), batch())


def test_a_budget_bounds_the_tasks_at_a_time(monkeypatch, needed, sizes):
    """In proportion, and by no less than the activations that a task must keep."""
    kept = 16 * 5 * 8 * 2 * 3  # two layers' worth of 16 numbers for 5 points, three times: less cannot do
    assert needed > PEAK * kept
    for fitting, expected in [(0.5, [1] * 6), (1.5, [1] * 6), (2.5, [2] * 3), (3.5, [3] * 2), (5.5, [3] * 2), (7, [6])]:
        monkeypatch.setattr(metamom.maml.chunking, "BUDGET", int(fitting * needed))
        sizes.clear()
        learner(chunk_size="auto").meta_gradient(batch())
        assert sizes == [1, *expected], fitting  # first the one that is measured


@pytest.mark.parametrize("workers", [1, 2, 3, 6])
@pytest.mark.parametrize("fitting", [0.5, 2.5, 4.5, 1e6])
def test_auto_changes_nothing(monkeypatch, needed, workers, fitting):
    monkeypatch.setattr(metamom.maml.chunking, "BUDGET", int(fitting * needed))
    ours, theirs = (learner(chunk_size=size).meta_gradient(batch(), workers) for size in ("auto", None))
    for name in theirs.grads:
        torch.testing.assert_close(ours.grads[name], theirs.grads[name], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.losses, theirs.losses, rtol=1e-12, atol=1e-12)


def test_auto_in_evaluation(monkeypatch, needed):
    monkeypatch.setattr(metamom.maml.chunking, "BUDGET", int(2.5 * needed))
    with torch.no_grad():
        ours, theirs = (learner(chunk_size=size).losses(batch()) for size in ("auto", None))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_auto_measures_once_a_shape(sizes):
    auto = learner(chunk_size="auto")
    for tasks, points, measured in [(6, 5, True), (6, 5, False), (4, 5, False), (4, 7, True), (6, 7, False)]:
        sizes.clear()
        auto.meta_gradient(batch(tasks, points))
        assert sizes == [1, tasks][not measured :]
    auto.inner_steps = 5  # which keep more
    sizes.clear()
    auto.meta_gradient(batch())
    assert sizes == [1, 6]


def test_the_size_of_a_batch_does_not_count_as_a_tasks_memory():
    """A task is a view of its batch, and saved tensors of it share the batch's memory."""
    learner = MAML(mlp().double(), F.mse_loss, chunk_size="auto")
    few, many = (chosen(learner, regression_batch(tasks=n)) for n in (2, 2_000))
    assert few == many
    fresh = MAML(mlp().double(), F.mse_loss, chunk_size="auto")
    assert chosen(fresh, regression_batch(tasks=2_000)) == few


def test_measuring_leaves_no_gradient():
    auto = learner(chunk_size="auto")
    auto.meta_gradient(batch())
    assert all(p.grad is None for p in auto.parameters())


def test_more_inner_steps_leave_room_for_fewer_tasks(monkeypatch):
    """Conv4 on 5-way 5-shot episodes, in the default budget: some tasks at a time, not all that one can think of."""
    ways, shots = 5, 5
    x = torch.rand(1, ways * shots, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    y = torch.arange(ways).repeat(1, shots)
    model = Conv4(ways, generator=torch.Generator().manual_seed(0))
    few, many = (
        chosen(MAML(model, F.cross_entropy, inner_steps=steps, chunk_size="auto"), TaskBatch(x, y, x, y))
        for steps in (1, 3)
    )
    assert 1 <= many < few < 1000


@pytest.mark.parametrize("chunk_size", ["many", "", 0, -1], ids=repr)
def test_bad_chunk_sizes(chunk_size):
    message = rf'chunk_size must be a number of tasks >= 1, "auto", or None for all at once; got {chunk_size!r}\.'
    with pytest.raises(ValueError, match=message):
        learner(chunk_size=chunk_size)


def test_measuring_a_task_draws_nothing_for_the_run():
    """A model with dropout sees the same masks as without "auto"."""
    losses = []
    for chunk_size in (None, "auto"):
        model = nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        for p in model.parameters():
            nn.init.constant_(p, 0.5)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            losses.append(MAML(model, F.mse_loss, chunk_size=chunk_size).meta_gradient(Sinusoid().sample(0, 2)).losses)
    assert torch.equal(*losses)


def test_tensors_that_only_stand_for_others_take_no_memory():
    """`torch.cond` and `torch.compile` trace a part of the model with such tensors."""

    def gradient() -> None:
        with FakeTensorMode():
            w = torch.ones(2, requires_grad=True)
            (w.sin() * w).sum()

    one = TaskBatch(*(torch.ones(1, 2) for _ in range(4)))
    assert tasks_within_budget(gradient, one, 0) == tasks_within_budget(lambda: None, one, 0)
