"""learn2learn's unit tests of MAML, MetaSGD, GBML and task sets: their set-ups and what they want, in our words.

Sources (github.com/learnables/learn2learn): ``tests/unit/algorithms/maml_test.py``, ``metasgd_test.py`` and
``gbml_test.py`` (the same tests, with a learned step size for each entry as the transform), and
``tests/unit/data/task_dataset_test.py`` and ``transforms_test.py``. Their `adapt` on the norm of an output is an inner
step on a loss without targets here.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from slow_maml import slow_meta_gradient
from torch import Tensor, nn

from metamom import MAML, TaskBatch
from metamom.maml.estimators import Estimator
from metamom.tasks import Episodes, FixedTasks

INPUTS, SIZE, HIDDEN, INNER_LR = 7, 10, 20, 0.01
LEARNERS: dict[str, dict[str, Any]] = {"MAML": {}, "MetaSGD and GBML": {"learn_inner_lr": "entry"}}
each_learner = pytest.mark.parametrize("options", LEARNERS.values(), ids=LEARNERS)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(SIZE, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.Sigmoid(), nn.Linear(HIDDEN, HIDDEN),
        nn.Softmax(1),
    ).double()  # fmt: skip
    model.register_buffer("dummy_buf", torch.zeros(1, 2, 3, 4))
    return model


def norm_of(output: Tensor) -> Tensor:
    return output.norm()


def batch(tasks: int = 2) -> TaskBatch:
    x = torch.randn(tasks, INPUTS, SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return TaskBatch(x, None, x, None)


@each_learner
@pytest.mark.parametrize("estimator", ["exact", "first-order"])
def test_weights_before_adaptation_predict_as_the_model(estimator, options):
    model, tasks = network(), batch()
    learner = MAML(model, norm_of, inner_lr=INNER_LR, estimator=estimator, **options)
    for _ in range(2):
        start = learner.adapt(tasks.support_x, None, steps=0)
        torch.testing.assert_close(learner.predict(start, tasks.query_x)[1], model(tasks.query_x[1]), rtol=0, atol=1e-8)


@each_learner
def test_adaptation_lowers_the_loss_and_every_parameter_has_a_gradient(options):
    model, tasks = network(), batch()
    learner = MAML(model, norm_of, inner_lr=INNER_LR, **options)
    adapted = learner.losses(tasks)
    before = torch.stack([norm_of(model(x)) for x in tasks.query_x])
    assert (adapted <= before).all()
    adapted.sum().backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for p in learner.parameters())


def test_the_gradient_of_the_first_order_is_that_at_the_adapted_weights():
    """After three steps: that of a model with these weights."""
    model, tasks = network(), batch(1)
    learner = MAML(model, norm_of, inner_lr=INNER_LR, inner_steps=3, estimator="first-order")
    found = learner.meta_gradient(tasks).grads
    adapted = learner.adapt(tasks.support_x, None)
    ends = {name: w[0].detach().requires_grad_() for name, w in adapted.items()}
    loss = norm_of(torch.func.functional_call(model, ends, (tasks.query_x[0],)))
    for name, grad in zip(ends, torch.autograd.grad(loss, list(ends.values())), strict=True):
        torch.testing.assert_close(found[name][0], grad, rtol=0, atol=1e-8)


def test_as_many_learned_step_sizes_as_weights():
    """MetaSGD has twice the parameters, and each step size starts at the one given."""
    model = network()
    learner = MAML(model, norm_of, inner_lr=0.1, learn_inner_lr="entry")
    weights = sum(p.numel() for p in model.parameters())
    assert sum(p.numel() for p in learner.parameters()) == 2 * weights
    own = {id(p) for p in model.parameters()}
    sizes = [p for p in learner.parameters() if id(p) not in own]
    assert all(torch.equal(p, torch.full_like(p, 0.1)) for p in sizes)


class EveryOther(nn.Module):
    """Every second parameter has a part in the output."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = network()

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([p.norm() for p in list(self.layers.parameters())[::2]]) + 0 * x.sum()


def test_unused_parameters_are_allowed():
    model, tasks = EveryOther(), batch()
    learner = MAML(model, lambda output: output.sum(), inner_lr=INNER_LR)
    adapted = learner.adapt(tasks.support_x, None)
    learner.backward(tasks)
    for i, (name, p) in enumerate(model.named_parameters()):
        used = i % 2 == 0
        assert (adapted[name][0] != p).any() == used
        assert (p.grad is not None and p.grad.any().item()) == used


def test_frozen_parameters_stay_without_being_named():
    """learn2learn wants ``allow_nograd=True`` for this."""
    model, tasks = network(), batch()
    model[2].weight.requires_grad_(False)
    before = model[2].weight.clone()
    learner = MAML(model, norm_of, inner_lr=INNER_LR)
    assert "2.weight" not in learner.adapt(tasks.support_x, None)
    learner.backward(tasks)
    assert model[2].weight.grad is None
    assert torch.equal(model[2].weight, before)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("estimator", ["exact", "first-order"])
def test_meta_gradients_are_those_of_a_loop(estimator: Estimator):
    x = batch().support_x
    y = torch.rand(2, INPUTS, HIDDEN, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    tasks = TaskBatch(x, y, x, y)
    model = network()
    wanted, _ = slow_meta_gradient(
        model, nn.MSELoss(), tasks, steps=2, inner_lr=INNER_LR, first_order=estimator == "first-order"
    )
    found = MAML(model, nn.MSELoss(), inner_lr=INNER_LR, inner_steps=2, estimator=estimator).meta_gradient(tasks).grads
    for name, grad in wanted.items():
        torch.testing.assert_close(found[name][0], grad, rtol=1e-9, atol=1e-12)


# task sets

CLASSES, SHAPE = 10, 16


def data(ways: int = 3, shots: int = 2, queries: int = 2) -> Episodes:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(128) % CLASSES
    return Episodes(torch.randn(128, SHAPE, generator=generator), labels, ways=ways, shots=shots, queries=queries)


def test_a_set_of_ten_tasks_keeps_them():
    tasks = FixedTasks(data(), 10, fresh_data=False)
    seen: dict[int, Tensor] = {}
    for step in range(20):
        drawn = tasks.sample(step, 5)
        for i, x in zip(drawn.task_ids.tolist(), drawn.support_x, strict=True):
            assert torch.equal(seen.setdefault(i, x), x)
    assert sorted(seen) == list(range(10))


def test_tasks_without_end_differ():
    tasks = data()
    drawn = [tasks.sample(step, 1).support_x for step in range(6)]
    assert all(not torch.equal(a, b) for a, b in pairwise(drawn))


@pytest.mark.parametrize("ways", range(2, 10))
def test_labels_are_renamed_to_the_first_numbers(ways):
    drawn = data(ways=ways).sample(0, 8)
    assert drawn.support_x.shape == (8, 2 * ways, SHAPE)
    for labels in (drawn.support_y, drawn.query_y):
        assert all(row.unique().tolist() == list(range(ways)) for row in labels)


@pytest.mark.parametrize("shots", range(1, 10))
def test_each_class_has_as_many_shots(shots):
    drawn = data(ways=CLASSES, shots=shots, queries=1).sample(0, 8)
    assert all(row.bincount().tolist() == [shots] * CLASSES for row in drawn.support_y)
