"""Positive inner step sizes: their logarithms are learned, with the chain rule's gradients."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import metamom
from metamom import MAML, train
from metamom.tasks import Sinusoid

TASKS = Sinusoid(shots=4, queries=3)
TASKS64 = Sinusoid(shots=4, queries=3, dtype=torch.float64)
KINDS = ["scalar", "tensor", "tensor-step", "entry"]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 1)).double()


def made(learn="tensor", positive=True, **options) -> MAML:
    options = {"inner_lr": 0.05, "inner_steps": 2, "learn_inner_lr": learn} | options
    return MAML(network(), F.mse_loss, positive_inner_lr=positive, **options)


def batch(step=0):
    return TASKS.sample(step, 4).to("cpu", torch.float64)


@pytest.mark.parametrize("options", [{}, {"vectorize": "loop"}, {"chunk_size": 1}, {"compile": True}])
@pytest.mark.parametrize("learn", KINDS)
def test_gradients_by_the_chain_rule(learn, options, traced):
    """``dL/d log(alpha) = alpha dL/d alpha``, and other gradients as with alpha itself."""
    ours, plain = made(learn, **options), made(learn, positive=False)
    (found, losses), (wanted, expected) = (each.meta_gradient(batch(), workers=2) for each in (ours, plain))
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=0)
    assert list(found) == list(wanted)
    assert any(name.startswith("inner_lr") for name in wanted)
    for name, grad in wanted.items():
        scale = 0.05 if name.startswith("inner_lr") else 1.0
        torch.testing.assert_close(found[name], scale * grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("learn", KINDS)
def test_adam_cannot_make_them_negative(learn):
    """Each of Adam's first steps of size γ multiplies them by e^γ or e^-γ; of plain step sizes, it takes γ away."""
    for positive in (True, False):
        learner = made(learn, positive, inner_lr=0.001)
        optimizer = torch.optim.Adam(learner.step_sizes.parameters(), lr=0.1, eps=1e-100)
        learner.backward(batch())
        optimizer.step()
        values = learner.inner_lr if isinstance(learner.inner_lr, dict) else {"": learner.inner_lr}
        for alpha in values.values():
            moved = (alpha.detach() / 0.001).log().abs() if positive else (alpha.detach() - 0.001).abs()
            torch.testing.assert_close(moved, torch.full_like(moved, 0.1), rtol=1e-6, atol=0)
            assert not positive or bool((alpha > 0).all())


def test_they_show_and_take_step_sizes():
    learner = made("tensor")
    assert learner.inner_lr["0.weight"].item() == pytest.approx(0.05)
    learner.inner_lr = 0.2
    assert learner.inner_lr["0.weight"].item() == pytest.approx(0.2)
    assert learner.meta_parameters()["inner_lr.0.weight"].item() == pytest.approx(torch.tensor(0.2).log().item())
    assert learner.describe()["inner_lr"]["positive"]
    with pytest.raises(ValueError, match=r"inner_lr must be > 0 and finite; got -0\.1"):
        learner.inner_lr = -0.1
    with pytest.raises(AttributeError, match="positive_inner_lr is fixed when a learner is made"):
        learner.positive_inner_lr = False


def test_copies_and_states():
    learner = made("tensor-step")
    learner.inner_lr = 0.3
    stored = io.BytesIO()
    torch.save(learner.state_dict(), stored)
    stored.seek(0)
    other = made("tensor-step")
    other.load_state_dict(torch.load(stored, weights_only=True))
    for each in (other, copy.deepcopy(learner), pickle.loads(pickle.dumps(learner)), learner.like()):
        for name, grad in learner.meta_gradient(batch()).grads.items():
            torch.testing.assert_close(each.meta_gradient(batch()).grads[name], grad, rtol=1e-12, atol=0)


@pytest.mark.parametrize("learn", KINDS)
def test_a_run_goes_on_and_loads(learn, tmp_path):
    for iterations in (1, 2):
        learner = made(learn)
        optimizer = torch.optim.Adam(learner.parameters(), lr=0.1)
        train(learner, optimizer, TASKS64, iterations=iterations, meta_batch=2, run_dir=tmp_path, resume=True)
    loaded = metamom.load(tmp_path, model=network()).learner
    assert loaded.step_sizes.positive
    assert loaded.step_sizes.kind == learn
    for name, p in learner.meta_parameters().items():
        torch.testing.assert_close(loaded.meta_parameters()[name], p, rtol=0, atol=0)
    other = made(learn, positive=False)
    optimizer = torch.optim.Adam(other.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="positive"):
        train(other, optimizer, TASKS64, iterations=3, meta_batch=2, run_dir=tmp_path, resume=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learn": False}, "positive_inner_lr learns the logarithms of inner step sizes: choose which"),
        ({"positive": 1}, "positive_inner_lr must be"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        made(**options)
