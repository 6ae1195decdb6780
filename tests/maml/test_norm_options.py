"""Normalisation with the other options: estimators, chunks, dtypes, threads, exported models, compiling."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from as_in_a_loop import Given
from normalised_models import INNER_LR, MAKE, TASKS, Loop, case, with_statistics
from problems import WAYS, assert_close, labelled_batch, randomised
from torch import Tensor, nn
from torch.nn import functional as F

from metamom import MAML, TaskBatch, evaluate
from metamom.common.choices import NORMS, Norm


def test_a_layer_that_is_called_twice_has_the_statistics_of_each_call():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.norm, self.head = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, WAYS)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(torch.tanh(self.norm(self.body(x)))))

    class Apart(nn.Module):
        def __init__(self, twice: Twice) -> None:
            super().__init__()
            self.body, self.norm, self.head = twice.body, twice.norm, twice.head
            self.again = nn.BatchNorm1d(4)
            self.again.weight, self.again.bias = twice.norm.weight, twice.norm.bias

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.again(torch.tanh(self.norm(self.body(x)))))

    model, batch = randomised(Twice()), labelled_batch(4)
    found = MAML(model, F.cross_entropy, norm="support").meta_gradient(batch)
    expected = MAML(Apart(model).double(), F.cross_entropy, norm="support").meta_gradient(batch)
    assert_close(found.grads, expected.grads, 1e-12)


@pytest.mark.parametrize("norm", NORMS)
def test_instance_normalisation(norm):
    """Running statistics if they are frozen, else those of each instance, and so the same for one query or many."""
    layer = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
    model = with_statistics(randomised(nn.Sequential(nn.Conv2d(1, 4, 3), layer, nn.Flatten(), nn.Linear(36, WAYS))))
    own = copy.deepcopy(model).train(norm != "frozen")
    if norm != "frozen":
        own[1].track_running_stats, own[1].running_mean, own[1].running_var = False, None, None
    batch = labelled_batch(1, 5, 5)
    found = MAML(model, F.cross_entropy, inner_lr=INNER_LR, norm=norm).meta_gradient(batch)
    loop = Loop(own, "batch")
    expected, losses = loop.meta_gradient(own, batch)
    assert_close({n: g[0] for n, g in found.grads.items()}, expected, 1e-9)
    torch.testing.assert_close(found.losses, losses)


@pytest.mark.parametrize(
    ("estimator", "inner_batches", "points"),
    [("independent", "same", slice(0, 3)), ("exact", "fresh", slice(0, 6)), ("hessian-free", "fresh", slice(0, 6))],
)
def test_the_support_statistics_are_of_the_points_that_give_the_inner_gradients(estimator, inner_batches, points):
    model, wide = MAKE["1d"][0](), labelled_batch(4, queries=12)
    model = with_statistics(randomised(model))
    halves = 1 if estimator == "exact" else 2
    turns = 2 if inner_batches == "fresh" else 1
    support = torch.cat([wide.support_x, wide.query_x], 1)[:, : 3 * halves * turns]
    labels = torch.cat([wide.support_y, wide.query_y], 1)[:, : 3 * halves * turns]
    batch = TaskBatch(support, labels, wide.query_x, wide.query_y)
    learner = MAML(
        model, F.cross_entropy, inner_lr=INNER_LR, inner_steps=turns, estimator=estimator, inner_batches=inner_batches,
        norm="support",
    )  # fmt: skip
    slow, weights = Loop(model, "support"), {n: p.detach().requires_grad_() for n, p in model.named_parameters()}
    for t, loss in enumerate(learner.meta_gradient(batch).losses):
        own = weights
        for turn in range(turns):
            part = slice(3 * turn, 3 * turn + 3)
            own = slow.adapt(own, support[t, part], labels[t, part], 1, list(own))
        out = slow.predict(own, batch.query_x[t], support[t, points])
        torch.testing.assert_close(loss, F.cross_entropy(out, batch.query_y[t]).detach())


@pytest.mark.parametrize("norm", NORMS)
def test_chunks_and_random_layers(norm):
    model, batch = case("1d")
    model.append(nn.Dropout(0.5)).append(nn.Linear(WAYS, WAYS).double())
    found = []
    for chunk_size in (None, 1, 3):
        learner = MAML(model, F.cross_entropy, chunk_size=chunk_size, norm=norm)
        for _ in range(2):  # the first call finds out that the model draws
            torch.manual_seed(0)
            grads = learner.meta_gradient(batch).grads
        found.append(grads)
    for other in found[1:]:
        assert_close(found[0], other, 1e-12)


@pytest.mark.parametrize("norm", NORMS)
def test_bfloat16(norm):
    make, shape = MAKE["2d"]
    model, batch = with_statistics(randomised(make())).float(), labelled_batch(*shape, dtype=torch.float32)
    half, full = (
        MAML(model, F.cross_entropy, norm=norm, autocast=dtype).meta_gradient(batch).losses
        for dtype in (torch.bfloat16, None)
    )
    torch.testing.assert_close(half, full, rtol=0.1, atol=0.05)
    assert not torch.equal(half, full)


def test_parameters_without_a_use_are_checked_with_the_support_set():
    """One query alone has no statistics of its own."""
    model = with_statistics(randomised(MAKE["1d"][0]()))
    model.unused = nn.Parameter(torch.ones(1, dtype=torch.float64))
    model.forward = lambda x: nn.Sequential(*list(model.children())).forward(x)
    batch = labelled_batch(4)
    one = TaskBatch(batch.support_x, batch.support_y, batch.query_x[:, :1], batch.query_y[:, :1])
    grads, losses = MAML(model, F.cross_entropy, norm="support").meta_gradient(one)
    assert not grads["unused"].any()
    assert losses.isfinite().all()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        MAML(model, F.cross_entropy, norm="batch").meta_gradient(one)


def test_exported_models():
    model, batch = case("1d")
    model.eval()
    points = ({0: torch.export.Dim("points", min=2)},)
    exported = torch.export.export(model, (batch.support_x[0],), dynamic_shapes=points).module()
    for norm in NORMS:
        ours, theirs = (MAML(each, F.cross_entropy, norm=norm).meta_gradient(batch) for each in (model, exported))
        assert_close(dict(zip(ours.grads, theirs.grads.values(), strict=True)), ours.grads, 1e-12)


def test_threads_that_choose_differently():
    model, batch = case("2d")
    learner = MAML(model, F.cross_entropy, inner_lr=INNER_LR)

    def values(norm: Norm) -> Tensor:
        return evaluate(learner, Given(batch), tasks=TASKS, steps=(0, 1, 2), norm=norm).values

    expected = [values(norm) for norm in NORMS]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(values, NORMS * 4))
    assert all(torch.equal(a, b) for a, b in zip(found, expected * 4, strict=True))


@pytest.mark.parametrize("estimator", ["moml", "scsc"])
def test_tracked_estimators(estimator):
    """A first visit is an inner step, as that of independent batches; later ones go on from it."""
    model, batch = case("1d", queries=3)
    batch = batch._replace(task_ids=torch.arange(TASKS))
    tracked, plain = (MAML(model, F.cross_entropy, norm="support", estimator=e) for e in (estimator, "independent"))
    first, expected = tracked.meta_gradient(batch), plain.meta_gradient(batch)
    assert_close(first.grads, expected.grads, 1e-12)
    torch.testing.assert_close(tracked.meta_gradient(batch).losses, first.losses)  # the same points and weights


@pytest.mark.parametrize(
    ("name", "norm"),
    [
        ("Conv4", "support"),
        ("2d", "batch"),
        ("2d", "frozen"),
        pytest.param("Conv4", "batch", marks=pytest.mark.slow),
        pytest.param("2d", "support", marks=pytest.mark.slow),
    ],
)
def test_compiled_graphs(traced, name, norm):
    model, batch = case(name)
    eager, compiled = (MAML(model, F.cross_entropy, norm=norm, compile=c) for c in (False, True))
    for _ in range(2):  # a graph reads the running statistics in each call
        found = compiled.meta_gradient(batch)
        expected = eager.meta_gradient(batch)
        assert_close(found.grads, expected.grads, 1e-11)
        torch.testing.assert_close(found.losses, expected.losses)
        with torch.no_grad():
            for buffer in model.buffers():
                buffer.add_(1)
    assert len(traced) == 1
    compiled.norm = "support" if norm == "batch" else "batch"
    assert not torch.allclose(compiled.meta_gradient(batch).losses, expected.losses)
    assert len(traced) == 2


@pytest.mark.slow
def test_a_compiled_graph_of_each_choice():
    model, batch = case("1d")
    for norm in NORMS:
        found, expected = (
            MAML(model, F.cross_entropy, norm=norm, compile=c).meta_gradient(batch).grads for c in (True, False)
        )
        assert_close(found, expected, 1e-11)
