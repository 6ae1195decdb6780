"""Forward hooks: those that keep tensors get usable ones, the others stay under vmap."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from problems import assert_close, labelled_batch, randomised
from slow_maml import slow_meta_gradient
from torch import nn
from torch.nn import functional as F
from torch.nn.modules import module as every_module

from metamom import MAML

TASKS = 4
KEEPING: dict[str, Callable[[list[Any], Any, Any], None]] = {
    "the output": lambda kept, args, out: kept.append(out),
    "the inputs": lambda kept, args, out: kept.append(args),
    "a detached output": lambda kept, args, out: kept.append(out.detach()),
    "a mean": lambda kept, args, out: kept.append({"mean": out.detach().mean()}),
}
HARMLESS: dict[str, Callable[[list[Any], Any, Any], Any]] = {
    "counts": lambda kept, args, out: kept.append(1),
    "notes shapes": lambda kept, args, out: kept.append(out.shape),
    "computes": lambda kept, args, out: kept.append(out.detach().square().dim()),
    "returns": lambda kept, args, out: out * 1.0,
    "returns the same": lambda kept, args, out: out,
}


def network() -> nn.Module:
    return randomised(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))


@contextmanager
def hooked(hook: Callable[[list[Any], Any, Any], Any]) -> Iterator[list[Any]]:
    kept: list[Any] = []
    handle = every_module.register_module_forward_hook(lambda module, args, out: hook(kept, args, out))
    try:
        yield kept
    finally:
        handle.remove()


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("name", KEEPING)
def test_hooks_that_keep_tensors_get_usable_ones(name, before):
    model, batch = network(), labelled_batch(4)
    learner = MAML(model, F.cross_entropy, inner_lr=0.1)
    expected, _ = slow_meta_gradient(model, F.cross_entropy, batch, inner_lr=0.1)
    for _ in range(2 * before):
        learner.meta_gradient(batch)
    with hooked(KEEPING[name]) as kept:
        with pytest.warns(UserWarning, match=r"^a forward hook of all modules cannot run on all tasks at once"):
            learner.meta_gradient(batch)
        kept.clear()
        found = learner.meta_gradient(batch)
        assert len(kept) >= 2 * TASKS * 4  # steps and queries, tasks, modules
        for each in torch.utils._pytree.tree_leaves(kept):
            each.sum().item()
    assert_close({key: grad[0] for key, grad in found.grads.items()}, expected, 1e-9)


@pytest.mark.parametrize("name", HARMLESS)
def test_other_hooks_stay_under_vmap(name):
    model, batch = network(), labelled_batch(4)
    learner = MAML(model, F.cross_entropy, inner_lr=0.1)
    expected, _ = slow_meta_gradient(model, F.cross_entropy, batch, inner_lr=0.1)
    with hooked(HARMLESS[name]), warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            found = learner.meta_gradient(batch)
    assert not learner._vectorization.looped
    assert_close({key: grad[0] for key, grad in found.grads.items()}, expected, 1e-9)


RETURNING: dict[str, Callable[[list[Any], Any, Any], Any]] = {
    name: lambda kept, args, out, keep=keep: (keep(kept, args, out), out)[1] for name, keep in KEEPING.items()
}


@pytest.mark.parametrize("name", RETURNING)
def test_hooks_of_a_module_that_return_something_and_keep_tensors(name):
    """Hooks that return nothing never run under vmap; these could."""
    model, batch, kept = network(), labelled_batch(4), list[Any]()
    expected, _ = slow_meta_gradient(model, F.cross_entropy, batch, inner_lr=0.1)
    learner = MAML(model, F.cross_entropy, inner_lr=0.1)
    model[1].register_forward_hook(lambda module, args, out: RETURNING[name](kept, args, out))
    with pytest.warns(UserWarning, match=r"^a forward hook of 1 cannot run on all tasks at once"):
        learner.meta_gradient(batch)
    kept.clear()
    found = learner.meta_gradient(batch)
    assert len(kept) >= 2 * TASKS
    for each in torch.utils._pytree.tree_leaves(kept):
        each.sum().item()
    assert_close({key: grad[0] for key, grad in found.grads.items()}, expected, 1e-9)


def test_hooks_before_a_module_that_keep_its_inputs():
    model, batch, kept = network(), labelled_batch(4), list[Any]()
    learner = MAML(model, F.cross_entropy, inner_lr=0.1)
    model[2].register_forward_pre_hook(lambda module, args: (kept.append(args[0].detach()), args)[1])
    with pytest.warns(UserWarning, match=r"^a forward hook of 2 cannot run on all tasks at once"):
        learner.meta_gradient(batch)
    assert all(each.sum().item() is not None for each in kept[-2 * TASKS :])
    assert next(iter(model[2]._forward_pre_hooks.values())).__module__ == __name__


@pytest.mark.parametrize("name", [name for name in HARMLESS if "returns" in name])
def test_hooks_of_a_module_that_keep_nothing_stay_under_vmap(name):
    model, batch = network(), labelled_batch(4)
    expected, _ = slow_meta_gradient(model, F.cross_entropy, batch, inner_lr=0.1)
    learner = MAML(model, F.cross_entropy, inner_lr=0.1)
    model[1].register_forward_hook(lambda module, args, out: HARMLESS[name]([], args, out))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            found = learner.meta_gradient(batch)
    assert not learner._vectorization.looped
    assert_close({key: grad[0] for key, grad in found.grads.items()}, expected, 1e-9)
