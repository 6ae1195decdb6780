"""Models and options that a learner refuses, and models that it takes."""

from __future__ import annotations

import math
from collections import OrderedDict

import pytest
import torch
from problems import (
    assert_close,
    mean_over_workers,
    mlp,
    randomised,
    regression_batch,
)
from slow_maml import slow_meta_gradient
from torch import Tensor, nn
from torch.nn import functional as F

from metamom import MAML, TaskBatch
from metamom.maml.vmap_errors import _inplace_modules


class Faulty(nn.Module):
    """Does in ``forward`` what per-task weights forbid."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.lin = nn.Linear(2, 1)
        self.how = how
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "buffer":
            self.count += 1
        if self.how == "buffer from data":
            self.count.copy_(x.mean())
        if self.how == "input":
            x.mul_(2)
        if self.how == "parameter":
            self.lin.weight.mul_(2)
        if self.how == "parameter without gradients":
            with torch.no_grad():
                self.lin.weight.mul_(0.5)
        if self.how == "if" and x.sum() > 0:
            x = x + 1
        if self.how == "item":
            x = x * x.max().item()
        if self.how == "mask":
            x = x[x[:, 0] > 0]
        return self.lin(x)


FAULTS = {
    "buffer": r"changed in place: 1\.body\.count",
    "buffer from data": "module '1.body' \\(Faulty\\)",
    "input": "changed in place: its input",
    "parameter": "module '1.body' \\(Faulty\\)",
    "parameter without gradients": r"changed in place: 1\.body\.lin\.weight|module '1.body' \(Faulty\).*written-to",
    "if": "module '1.body' \\(Faulty\\).*control flow",
    "item": "module '1.body' \\(Faulty\\).*item",
    "mask": "module '1.body' \\(Faulty\\)",
}


@pytest.mark.parametrize("how", FAULTS)
@pytest.mark.parametrize("tasks", [1, 3])
def test_a_model_that_cannot_run_over_tasks_is_named(how, tasks):
    faulty = Faulty(how)
    model = nn.Sequential(nn.Identity(), nn.Sequential(OrderedDict(body=faulty)))
    batch = regression_batch(tasks=tasks).to(dtype=torch.float32)
    if how == "if":
        batch = batch._replace(support_x=batch.support_x.abs())
    with pytest.raises(ValueError, match=f"(?s)({FAULTS[how]}).*Write the forward without in-place"):
        MAML(model, F.mse_loss, vectorize="vmap").meta_gradient(batch)
    assert faulty.count.item() == 0


def test_a_layer_without_a_batching_rule_is_named():
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.memory = nn.LSTM(2, 3, batch_first=True)
            self.out = nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.memory(x)[0][:, -1])

    batch = TaskBatch(torch.randn(2, 3, 4, 2), torch.randn(2, 3, 1), torch.randn(2, 3, 4, 2), torch.randn(2, 3, 1))
    with pytest.raises(ValueError, match=r"module 'memory' \(LSTM\).*Batching rule not implemented"):
        MAML(Recurrent(), F.mse_loss, vectorize="vmap").meta_gradient(batch)


@pytest.mark.parametrize("workers", [1, 3])
def test_a_single_parameter_may_lie_in_memory_as_it_likes(workers):
    """Such as a convolution's without a bias, its channels last."""
    model = nn.Conv2d(2, 3, 3, bias=False).double().to(memory_format=torch.channels_last)
    assert not model.weight.is_contiguous()
    torch.manual_seed(0)
    sizes = [(3, n, *shape) for n in (4, 2) for shape in ((2, 3, 3), (3, 1, 1))]
    batch = TaskBatch(*(torch.randn(size, dtype=torch.float64) for size in sizes))
    grads, _ = MAML(model, F.mse_loss, inner_lr=0.1).meta_gradient(batch, workers=workers)
    expected, _ = slow_meta_gradient(model, F.mse_loss, batch, inner_lr=0.1)
    assert_close(mean_over_workers(grads), expected)


def test_in_place_activations_inside_are_fine():
    model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(inplace=True), nn.Linear(4, 1))
    randomised(model)
    grads, _ = MAML(model, F.mse_loss, inner_lr=0.05).meta_gradient(regression_batch())
    expected, _ = slow_meta_gradient(model, F.mse_loss, regression_batch(), inner_lr=0.05)
    assert_close(mean_over_workers(grads), expected)


def test_only_modules_with_torchs_own_option_count_as_in_place():
    class Block(nn.Sequential):
        inplace = True  # means something else here

    class Mine(nn.ReLU):
        pass

    model = nn.Sequential(Block(nn.ReLU()), Mine(inplace=True), nn.Dropout(0.1, inplace=True))
    model[0].inplace = torch.ones(2)
    assert _inplace_modules(model) == "one of the in-place modules '1' (Mine), '2' (Dropout)"
    assert _inplace_modules(Block(nn.ReLU())) is None


def test_loss_functions():
    batch = regression_batch()
    model = mlp().double()
    with pytest.raises(ValueError, match=r"one number per task, as reduction='mean' does; got shape \(5, 1\)"):
        MAML(model, nn.MSELoss(reduction="none")).meta_gradient(batch)
    with pytest.raises(ValueError, match=r"loss_fn cannot run on all tasks at once: vmap"):
        MAML(model, lambda p, y: F.mse_loss(p, y) if p.sum() > 0 else p.sum(), vectorize="vmap").meta_gradient(batch)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inner_steps": 0}, "inner_steps must be >= 1; got 0"),
        ({"estimator": "fo"}, "estimator must be one of exact, .*; got 'fo'"),
        ({"chunk_size": 0}, "chunk_size must be a number of tasks"),
        ({"inner_lr": 0.0}, "inner_lr must be > 0 and finite; got 0.0"),
        ({"inner_lr": -1.0}, "inner_lr must be > 0 and finite"),
        ({"inner_lr": math.nan}, "inner_lr must be > 0 and finite"),
        ({"inner_lr": math.inf}, "inner_lr must be > 0 and finite"),
        ({"inner_lr": {"weight": 0.1}}, r"missing \['bias'\], unknown \[\]"),
        ({"inner_lr": {"weight": 0.1, "bias": 0.1, "other": 0.1}}, r"missing \[\], unknown \['other'\]"),
        ({"inner_lr": {"weight": torch.ones(2, 1), "bias": 0.1}}, r"its shape \(1, 2\); got \(2, 1\)"),
        ({"inner_lr": {"weight": torch.zeros(1, 2), "bias": 0.1}}, "must be > 0 and finite; some of weight are not"),
        ({"inner_lr": {"weight": 0.1, "bias": 0.1}, "learn_inner_lr": "scalar"}, "pass inner_lr as one number"),
        ({"learn_inner_lr": "each"}, "learn_inner_lr must be a bool"),
        ({"adapt": ["head"]}, r"\['head'\] is none of weight, bias"),
        ({"adapt": lambda name: False}, "adapt selects no trainable parameter; the model has: weight, bias"),
        ({"adapt": []}, "adapt selects no trainable parameter"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        MAML(nn.Linear(2, 1), F.mse_loss, **options)


@pytest.mark.parametrize("workers", [3, 5])
def test_workers_must_divide_the_tasks(workers):
    with pytest.raises(ValueError, match="equal blocks"):
        MAML(mlp().double(), F.mse_loss).meta_gradient(regression_batch(tasks=4), workers=workers)


@pytest.mark.parametrize("workers", [True, 2.0, "2"])
def test_workers_are_a_whole_number(workers):
    with pytest.raises(TypeError, match="number of workers must be a whole number; got"):
        MAML(mlp().double(), F.mse_loss).backward(regression_batch(tasks=4), workers=workers)
