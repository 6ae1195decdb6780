"""Momentum on the workers is not averaged again by the server."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from metamom import (
    MAML,
    BiasedAccumulator,
    CompositeMomentum,
    TaskBatch,
    TopK,
    averaged,
)  # fmt: skip
from metamom.bias import EF21, EF21SGDM


@pytest.mark.parametrize("path", ["MAML", "BiasedAccumulator"])
def test_momentum_on_the_workers_is_not_averaged_again_by_the_server(path):
    """In anybody's loop too: the optimizer sees it from the gradient, and nothing has moved."""
    w = torch.nn.Linear(2, 1, bias=False)
    operator = EF21SGDM(TopK(1), eta=0.5)
    learner = MAML(w, torch.nn.functional.mse_loss)
    accumulator = BiasedAccumulator(w.parameters(), bias=operator, workers=1)
    generator = torch.Generator().manual_seed(0)

    def backward(bias):
        w.zero_grad()
        x, y = torch.randn(2, 3, 2, generator=generator), torch.randn(2, 3, 1, generator=generator)
        if path == "MAML":
            learner.backward(TaskBatch(x, y, x, y), bias=bias)
        else:
            w(x).square().sum().backward()
            accumulator.bias = bias
            accumulator.add()
            accumulator.finish()

    optimizer = CompositeMomentum(w.parameters(), lr=0.1, beta=0.3)
    before = w.weight.detach().clone()
    backward(operator)
    with pytest.raises(ValueError, match=r"ef21-sgdm\(0\.5\):topk:1 carries the momentum.*beta=1.*got beta=0\.3"):
        optimizer.step()
    assert torch.equal(w.weight.detach(), before)
    assert not optimizer.state
    optimizer.param_groups[0]["beta"] = 1.0
    optimizer.step()
    assert not torch.equal(w.weight.detach(), before)
    optimizer.param_groups[0]["beta"] = 0.3
    backward(EF21(TopK(1)))  # no momentum of its own: nothing to be said
    optimizer.step()


def averaged_gradient(operator=None) -> tuple[torch.nn.Linear, CompositeMomentum]:
    """A layer whose gradient comes from workers with momentum of their own, and an optimizer that would add more."""
    layer = torch.nn.Linear(2, 1, bias=False)
    optimizer = CompositeMomentum(layer.parameters(), lr=0.1, beta=0.3)
    x, y = torch.ones(2, 3, 2), torch.ones(2, 3, 1)
    MAML(layer, torch.nn.functional.mse_loss).backward(TaskBatch(x, y, x, y), bias=operator or EF21SGDM(TopK(1)))
    return layer, optimizer


def halve(layer):
    layer.weight.grad = layer.weight.grad * 0.5


def add_another_gradient(layer):
    layer(torch.ones(1, 2)).sum().backward()


@pytest.mark.parametrize(
    "change",
    [
        halve,
        add_another_gradient,
        lambda layer: torch.nn.utils.clip_grad_norm_(layer.parameters(), 1e-3),
        lambda layer: setattr(layer.weight, "grad", layer.weight.grad.clone()),
        lambda layer: layer.weight.grad.mul_(0.5),
    ],
    ids=["assigned", "accumulated", "clipped", "cloned", "in place"],
)
def test_the_guard_outlives_changes_of_the_gradient(change):
    layer, optimizer = averaged_gradient()
    change(layer)
    with pytest.raises(ValueError, match=r"ef21-sgdm\(0\.1\):topk:1 carries the momentum"):
        optimizer.step()
    assert not vars(layer.weight.grad)  # nothing hangs on somebody else's tensor
    assert not vars(layer.weight)


@pytest.mark.parametrize("zero", ["optimizer", "to zero", "new optimizer", "other operator"])
def test_the_guard_ends_with_the_gradient(zero):
    """The same parameters train by other means afterwards."""
    layer, optimizer = averaged_gradient()
    if zero == "new optimizer":
        layer.zero_grad()
        optimizer = CompositeMomentum(layer.parameters(), lr=0.1, beta=0.3)
    elif zero == "other operator":
        layer.zero_grad()
        x = torch.ones(2, 3, 2)
        batch = TaskBatch(x, x[..., :1], x, x[..., :1])
        MAML(layer, torch.nn.functional.mse_loss).backward(batch, bias=TopK(1))
    else:
        optimizer.zero_grad(set_to_none=zero == "optimizer")
    add_another_gradient(layer)
    before = layer.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(before, layer.weight.detach())


def test_a_step_uses_the_gradient_up():
    layer, optimizer = averaged_gradient()
    optimizer.param_groups[0]["beta"] = 1.0
    optimizer.step()
    layer.zero_grad()
    optimizer.param_groups[0]["beta"] = 0.3
    add_another_gradient(layer)
    optimizer.step()


def test_the_guard_keeps_neither_parameters_nor_operators_alive():
    operator = EF21SGDM(TopK(1))
    layer, optimizer = averaged_gradient(operator)
    gone = weakref.ref(layer.weight), weakref.ref(operator)
    noted = len(averaged._specs)
    del layer, optimizer, operator
    gc.collect()
    assert [ref() for ref in gone] == [None, None]
    assert len(averaged._specs) < noted
