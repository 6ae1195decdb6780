"""Steps like the one before: no further checks while nothing but values changes, and all of them if anything does."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from problems import generator, relative_error
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules import module as every_module

import metamom
from metamom import MAML, CompositeMomentum, TaskBatch
from metamom.maml.checks.not_finite import DivergedError

Change = Callable[[MAML], object]


class Small(nn.Module):
    """Two layers, a buffer, a frozen parameter and a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(2, 6), nn.Linear(6, 1)
        self.register_buffer("shift", torch.full((6,), 0.1))
        self.frozen = nn.Parameter(torch.full((6,), 0.7), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x) + self.shift) * self.frozen
        out: Tensor = self.head(hidden if self.training else 2 * hidden)
        return out


def batch(seed: int = 0, *, tasks: int = 4, points: int = 5, dtype: torch.dtype = torch.float64) -> TaskBatch:
    draw = generator(seed)
    return TaskBatch(*(torch.randn(tasks, points, d, generator=draw, dtype=dtype) for d in (2, 1, 2, 1)))


@pytest.fixture(params=[True, False], ids=["compiled", "eager"])
def compiled(request) -> bool:
    return request.param


@pytest.fixture
def learner(compiled, traced) -> Callable[..., MAML]:
    def make(model: nn.Module | None = None, **options: object) -> MAML:
        torch.manual_seed(0)
        chosen = {"inner_lr": 0.1, "compile": compiled, "chunk_size": None, **options}
        return MAML((Small() if model is None else model).double(), F.mse_loss, **chosen)

    return make


def used(one: MAML, tasks: TaskBatch, workers: int = 1) -> bool:
    return one._gradients.again(tasks, workers) is not None


def gradients(one: MAML) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in one.meta_parameters().items() if p.grad is not None}


def step(one: MAML, tasks: TaskBatch, **options: object) -> tuple[dict[str, Tensor], float, dict[str, object]]:
    for parameter in one.parameters():
        parameter.grad = None
    done = one.backward(tasks, **options)
    return gradients(one), float(done.loss), done.metrics


def eager(one: MAML) -> MAML:
    """A learner with the same model, loss and options that does not compile."""
    learned = one.step_sizes.learned()
    sizes = {name: learned[f"inner_lr.{name}"].detach() for name in one.adapted} if learned else one.inner_lr
    return MAML(
        copy.deepcopy(one.model),
        one.loss_fn,
        inner_lr=sizes,
        inner_steps=one.inner_steps,
        estimator=one.estimator,
        learn_inner_lr=one.step_sizes.kind,
    )


def assert_same(one: MAML, tasks: TaskBatch, **options: object) -> None:
    found, loss, metrics = step(one, tasks, **options)
    wanted, wanted_loss, wanted_metrics = step(eager(one), tasks, **options)
    assert found.keys() == wanted.keys()
    assert relative_error(found, wanted) < 1e-12
    assert loss == pytest.approx(wanted_loss, rel=1e-12)
    assert metrics == pytest.approx(wanted_metrics)
    assert [*metrics] == [*wanted_metrics]


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("options", [{}, {"estimator": "first-order"}, {"learn_inner_lr": True}])
def test_steps_as_the_last_one_are_those_of_another_learner(learner, options, workers, compiled, traced):
    one = learner(**options)
    optimizer = CompositeMomentum(one.parameters(), lr=0.1, beta=0.5)
    assert not used(one, batch())
    for seed in range(4):
        assert_same(one, batch(seed), workers=workers)
        assert used(one, batch(seed + 1), workers)
        optimizer.step()
    assert len(traced) == (1 if compiled else 0)


def test_classes_get_their_accuracy(learner):
    one = learner(nn.Linear(2, 3))
    one.loss_fn = F.cross_entropy
    for seed in range(3):
        inputs = batch(seed)
        labels = torch.randint(3, (2, 4, 5), generator=generator(seed))
        assert_same(one, TaskBatch(inputs.support_x, labels[0], inputs.query_x, labels[1]))
    assert used(one, TaskBatch(inputs.support_x, labels[0], inputs.query_x, labels[1]))


def replace(part: str, new: Callable[[Tensor], object]) -> Change:
    """Set an attribute of the model, by its dotted name, to what ``new`` makes of it."""
    *path, last = part.split(".")

    def change(one: MAML) -> None:
        module = one.model.get_submodule(".".join(path))
        setattr(module, last, new(getattr(module, last)))

    return change


CHANGES: dict[str, Change] = {
    "inner_lr": lambda one: setattr(one, "inner_lr", 0.3),
    "inner_lr of one parameter": lambda one: setattr(
        one, "inner_lr", {name: 0.05 * (i + 1) for i, name in enumerate(one.adapted)}
    ),
    "inner_steps": lambda one: setattr(one, "inner_steps", 2),
    "estimator": lambda one: setattr(one, "estimator", "first-order"),
    "loss": lambda one: setattr(one, "loss_fn", F.l1_loss),
    "evaluation mode": lambda one: one.model.eval(),
    "mode of the learner": lambda one: one.eval(),
    "buffer in place": lambda one: one.model.shift.fill_(0.8),
    "another buffer": replace("shift", lambda old: old + 0.5),
    "frozen parameter in place": lambda one: one.model.frozen.data.fill_(0.2),
    "another frozen parameter": replace("frozen", lambda old: nn.Parameter(old * 3, requires_grad=False)),
    "weights in place": lambda one: one.model.head.weight.data.mul_(2),
    "other values of a weight": lambda one: setattr(one.model.head.weight, "data", one.model.head.weight.data * 2),
    "another weight": replace("head.weight", lambda old: nn.Parameter(old.detach() * 2)),
    "transposed strides": lambda one: setattr(
        one.model.first.weight, "data", one.model.first.weight.data.t().contiguous().t()
    ),
    "a weight is frozen": lambda one: one.model.first.weight.requires_grad_(False),
    "another module": replace("head", lambda old: nn.Sequential(nn.Linear(6, 1).double())),
    "a forward hook": lambda one: one.model.head.register_forward_hook(lambda module, args, out: out * 2),
    "a forward pre-hook": lambda one: one.model.head.register_forward_pre_hook(lambda module, args: (args[0] * 2,)),
    "a forward of its own": lambda one: setattr(
        one.model.head, "forward", MethodType(lambda layer, x: 3 * nn.Linear.forward(layer, x), one.model.head)
    ),
    "loaded weights": lambda one: one.load_state_dict(
        {name: value * 2 if value.is_floating_point() else value for name, value in one.state_dict().items()}
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_between_two_steps_counts(learner, change):
    one = learner()
    for seed in (0, 1):
        step(one, batch(seed))
    assert used(one, batch(2))
    change(one)
    assert_same(one, batch(2))
    assert_same(one, batch(3))


@pytest.mark.parametrize(
    "register", [every_module.register_module_forward_hook, every_module.register_module_forward_pre_hook]
)
def test_a_hook_of_every_module_counts(learner, register):
    """Both when it comes and when it goes."""

    def double(layer: nn.Module, *given: Any) -> Tensor | None:
        if isinstance(layer, fx.GraphModule):  # runs as a module only where TorchInductor is left out
            return given[-1] if register is every_module.register_module_forward_hook else None
        return given[-1][0] * 2 if register is every_module.register_module_forward_pre_hook else given[-1] * 2

    one = learner()
    for seed in (0, 1):
        step(one, batch(seed))
    hook = register(double)
    try:
        for seed in (2, 3):
            assert_same(one, batch(seed))
    finally:
        hook.remove()
    assert_same(one, batch(4))


def test_forward_hooks_that_a_graph_would_leave_out_are_named(learner, compiled):
    one, calls = learner(), []
    one.model.head.register_forward_hook(lambda *_: calls.append(1))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for seed in range(3):
            step(one, batch(seed))
    told = [str(each.message) for each in said if "forward hooks" in str(each.message)]
    assert len(told) == (1 if compiled else 0)
    assert all("head (Linear) run only while a graph is made" in text for text in told), told
    assert calls


def test_a_weight_is_trained_again(learner):
    one = learner()
    one.model.first.bias.requires_grad_(False)
    for seed in (0, 1):
        assert_same(one, batch(seed))
    one.model.first.bias.requires_grad_(True)
    one.inner_lr = 0.1
    for seed in (2, 3):
        assert_same(one, batch(seed))


BATCHES: dict[str, TaskBatch] = {
    "more tasks": batch(7, tasks=8),
    "more points": batch(7, points=6),
    "task ids": batch(7)._replace(task_ids=torch.arange(4)),
    "strides": TaskBatch(*(x.transpose(0, 1).contiguous().transpose(0, 1) for x in batch(7)[:4])),
    "a gradient": batch(7)._replace(query_x=batch(7).query_x.requires_grad_()),
    "trees": TaskBatch(*((x,) if i % 2 == 0 else x for i, x in enumerate(batch(7)[:4]))),
    "masks": metamom.pad([(x[:n], y[:n], u, v) for n, x, y, u, v in zip((5, 4, 3, 5), *batch(7)[:4], strict=True)]),
}


@pytest.mark.parametrize("tasks", BATCHES.values(), ids=BATCHES)
def test_a_batch_of_another_kind_counts(learner, tasks):
    one = learner()
    for seed in (0, 1):
        step(one, batch(seed))
    for _ in range(2):
        assert_same(one, tasks)
    assert_same(one, batch(2))


@pytest.mark.parametrize(
    "options",
    [
        {"workers": 2},
        {"bias": "topk:50%"},
        {"aggregate": "median", "workers": 4},
        {"worker_weights": [1, 3], "workers": 2},
    ],
    ids=str,
)
def test_other_arguments_count(learner, options):
    one = learner()
    for seed in (0, 1):
        step(one, batch(seed))
    assert_same(one, batch(2), **options)
    assert_same(one, batch(3))


def test_wrong_batches_are_refused_as_before(learner):
    one = learner()
    for seed in (0, 1):
        step(one, batch(seed))
    for wrong, error in (
        (batch()._replace(query_y=batch().query_y[:3]), ValueError),
        (batch()._replace(support_x=batch().support_x[..., :1]), ValueError),
        (tuple(batch()), TypeError),
        (batch(dtype=torch.float32), ValueError),
    ):
        with pytest.raises(error):
            one.backward(wrong)
    with pytest.raises(ValueError, match="workers"):
        one.backward(batch(), workers=3)
    assert_same(one, batch(2))


def test_values_that_are_not_finite_are_refused_and_leave_the_gradient(learner):
    one = learner()
    for seed in (0, 1):
        step(one, batch(seed))
    before = gradients(one)
    broken = batch(2)
    broken.query_x[1, 2, 0] = torch.nan
    with pytest.raises(ValueError, match=r"query_x.*task 1"):
        one.backward(broken)
    one.model.head.weight.data[0, 0] = torch.inf
    with pytest.raises(DivergedError):
        one.backward(batch(2))
    assert relative_error(gradients(one), before) == 0
    done = one.backward(batch(2), check_finite=False)
    assert not torch.isfinite(done.loss)


def test_gradients_add_up_and_hooks_run(learner):
    one = learner()
    step(one, batch(0))
    seen: list[str] = []
    one.model.head.weight.register_hook(lambda grad: seen.append("hook") or grad * 2)
    one.model.head.weight.register_post_accumulate_grad_hook(lambda parameter: seen.append("after"))
    one.backward(batch(1))
    found = gradients(one)
    first, _, _ = step(eager(one), batch(0))
    second, _, _ = step(eager(one), batch(1))
    for name, grad in found.items():
        twice = 2 if name == "head.weight" else 1
        torch.testing.assert_close(grad, first[name] + twice * second[name], rtol=1e-12, atol=1e-14)
    assert seen == ["hook", "after"]


def test_a_gradient_may_be_changed_in_place(learner):
    one = learner()
    for seed in (0, 1):
        step(one, batch(seed))
    first, _, _ = step(one, batch(2))
    for parameter in one.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(3)
    again, _, _ = step(one, batch(2))
    assert relative_error(again, first) == 0


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))], ids=["copy", "pickle"])
def test_copies_start_anew(learner, copied):
    one = learner()
    for seed in (0, 1):
        step(one, batch(seed))
    other = copied(one)
    assert not used(other, batch(2))
    other.model.head.weight.data.mul_(2)
    assert_same(other, batch(2))
    assert_same(one, batch(2))


def test_announced_batches_are_counted(learner, compiled):
    one = learner()
    one.expect(5)
    for seed in range(3):
        step(one, batch(seed))
    assert one._gradients.expected == (2 if compiled else 5)
