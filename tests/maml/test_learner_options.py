"""A learner's options, set when it is made or afterwards: what they say is what it does."""

from __future__ import annotations

import copy

import pytest
import torch
from problems import assert_close, regression_batch
from slow_maml import slow_meta_gradient
from torch import nn
from torch.nn import functional as F

from metamom import MAML, CompositeMomentum
from metamom.nets.models import Conv4

NAMES = ("0.weight", "0.bias", "2.weight", "2.bias")


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def means(learner: MAML, batch) -> dict[str, torch.Tensor]:
    return {name: g.mean(0) for name, g in learner.meta_gradient(batch).grads.items()}


# ---- inner_lr after construction


@pytest.mark.parametrize("before", [0.1, dict.fromkeys(NAMES, 0.1), torch.tensor(0.1)], ids=["one", "each", "tensor"])
@pytest.mark.parametrize(
    "after",
    [0.5, torch.tensor(0.5, dtype=torch.float64), {n: 0.1 * (i + 1) for i, n in enumerate(NAMES)}],
    ids=["one", "tensor", "each"],
)
@pytest.mark.parametrize("compile", [False, True])
def test_another_inner_lr_is_used(before, after, compile, traced):
    batch = regression_batch(tasks=3)
    learner = MAML(net(), F.mse_loss, inner_lr=before, compile=compile)
    learner.meta_gradient(batch)
    learner.inner_lr = after
    expected, _ = slow_meta_gradient(learner.model, F.mse_loss, batch, inner_lr=after)
    assert_close(means(learner, batch), expected)
    with torch.no_grad():
        adapted = learner.adapt(batch.support_x, batch.support_y)
        fresh = MAML(learner.model, F.mse_loss, inner_lr=after).adapt(batch.support_x, batch.support_y)
    assert_close(adapted, fresh)


@pytest.mark.parametrize("learn", ["scalar", "tensor", "entry"])
def test_learned_step_sizes_go_on_from_another_start(learn):
    batch = regression_batch(tasks=3)
    learner = MAML(net(), F.mse_loss, inner_lr=0.1, learn_inner_lr=learn)
    optimizer = CompositeMomentum(learner.parameters(), lr=0.1, beta=1.0)
    learned = learner.step_sizes.learned()
    learner.inner_lr = 0.5
    assert all((alpha == 0.5).all() for alpha in learned.values())
    fresh = MAML(copy.deepcopy(learner.model), F.mse_loss, inner_lr=0.5, learn_inner_lr=learn)
    assert_close(means(learner, batch), means(fresh, batch))
    learner.backward(batch)
    optimizer.step()
    assert all((alpha != 0.5).any() for alpha in learned.values())  # they are the optimizer's still


def test_inner_lr_reads_back():
    model = net()
    assert MAML(model, F.mse_loss, inner_lr=0.3).inner_lr == 0.3
    each = {name: 0.1 * (i + 1) for i, name in enumerate(NAMES)}
    assert MAML(model, F.mse_loss, inner_lr=each).inner_lr == each
    learner = MAML(model, F.mse_loss, inner_lr=0.3, learn_inner_lr="scalar")
    assert learner.inner_lr is learner.step_sizes.learned()["inner_lr"]
    learner.inner_lr = 0.4
    assert float(learner.inner_lr.detach()) == 0.4
    learner = MAML(model, F.mse_loss, inner_lr=0.3)
    learner.inner_lr = each
    assert learner.inner_lr == each
    assert learner.describe()["inner_lr"] == {"fixed": each, "learned": []}


@pytest.mark.parametrize("wrong", [0, -1.0, float("nan"), {"0.weight": 0.1}, torch.zeros(3)], ids=str)
def test_a_wrong_inner_lr_changes_nothing(wrong):
    learner = MAML(net(), F.mse_loss, inner_lr=0.3)
    with pytest.raises(ValueError, match=r"inner_lr|step size"):
        learner.inner_lr = wrong
    assert learner.inner_lr == 0.3


# ---- step sizes that require a gradient


@pytest.mark.parametrize("kind", [nn.Parameter, lambda x: x.requires_grad_()], ids=["parameter", "leaf"])
def test_a_step_size_that_requires_a_gradient_gets_it(kind):
    batch = regression_batch(tasks=3)
    alpha = kind(torch.tensor(0.2, dtype=torch.float64))
    learner = MAML(net(), F.mse_loss, inner_lr=alpha, inner_steps=2)
    expected, _ = slow_meta_gradient(learner.model, F.mse_loss, batch, steps=2, learned={"inner_lr": alpha})
    assert learner.meta_parameters()["inner_lr"] is alpha
    learner.backward(batch)
    assert_close({name: p.grad for name, p in learner.meta_parameters().items()}, expected)
    with torch.no_grad():
        alpha -= 0.1 * alpha.grad
    learner.zero_grad()
    alpha.grad = None
    expected, _ = slow_meta_gradient(learner.model, F.mse_loss, batch, steps=2, learned={"inner_lr": alpha})
    learner.backward(batch)
    assert_close({name: p.grad for name, p in learner.meta_parameters().items()}, expected)


def test_some_step_sizes_may_be_learned():
    batch = regression_batch(tasks=3)
    own = nn.Parameter(torch.full((4, 2), 0.2, dtype=torch.float64))
    learner = MAML(net(), F.mse_loss, inner_lr={**dict.fromkeys(NAMES, 0.1), "0.weight": own})
    every = MAML(net(), F.mse_loss, inner_lr={**dict.fromkeys(NAMES, 0.1), "0.weight": own.detach()},
                 learn_inner_lr="entry")  # fmt: skip
    found, expected = means(learner, batch), means(every, batch)
    assert set(found) == {*NAMES, "inner_lr.0.weight"}
    assert any(p is own for p in learner.parameters())
    assert_close(found, {name: expected[name] for name in found})


@pytest.mark.parametrize(
    ("alpha", "options", "said"),
    [
        (lambda: nn.Parameter(torch.tensor(0.1)).exp(), {}, "must be a leaf"),
        (lambda: nn.Parameter(torch.tensor(0.1)), {"learn_inner_lr": True}, "learn_inner_lr must be left out"),
        (lambda: nn.Parameter(torch.tensor(0.1, dtype=torch.float32)), {}, "dtype"),
    ],
)
def test_a_step_size_whose_gradient_would_be_lost_is_refused(alpha, options, said):
    with pytest.raises(ValueError, match=said):
        MAML(net(), F.mse_loss, inner_lr=alpha(), **options)


# ---- other options after construction


@pytest.mark.parametrize(
    ("name", "value"),
    [("inner_steps", 3), ("estimator", "first-order"), ("chunk_size", 1), ("loss_fn", F.l1_loss),
     ("loss_fn", nn.MSELoss())],
)  # fmt: skip
def test_an_option_set_later_is_as_if_made_with(name, value):
    batch = regression_batch(tasks=3)
    options = {"inner_lr": 0.1, "loss_fn": nn.L1Loss(), name: value}
    loss_fn = options.pop("loss_fn")
    learner = MAML(net(), nn.L1Loss(), inner_lr=0.1)
    learner.meta_gradient(batch)
    setattr(learner, name, value)
    assert_close(means(learner, batch), means(MAML(net(), loss_fn, **options), batch))


@pytest.mark.parametrize(
    ("name", "value", "kind", "said"),
    [
        ("inner_steps", 0, ValueError, "inner_steps must be >= 1"),
        ("inner_steps", 2.0, TypeError, "inner_steps must be a whole number"),
        ("inner_steps", True, TypeError, "inner_steps must be a whole number"),
        ("estimator", "second-order", ValueError, "estimator must be one of"),
        ("estimator", "moml", ValueError, "make another learner"),
        ("inner_batches", "old", ValueError, "inner_batches must be one of"),
        ("chunk_size", 0, ValueError, "chunk_size must be a number of tasks"),
        ("autocast", torch.float16, ValueError, "autocast must be"),
        ("loss_fn", "mse", TypeError, "loss_fn must be a function"),
        ("loss_fn", nn.MSELoss, TypeError, "loss_fn must be a function"),
        ("learn_inner_lr", True, AttributeError, "learn_inner_lr is fixed when"),
        ("tracking", 0.1, AttributeError, "tracking is fixed when"),
        ("compile", True, AttributeError, "compile is fixed when"),
        ("adapt", ["2"], AttributeError, "adapt is fixed when"),
        ("model", Conv4(5), ValueError, "same trainable parameters"),
    ],
)
def test_an_option_that_cannot_be_set_says_so(name, value, kind, said):
    learner = MAML(net(), F.mse_loss)
    with pytest.raises(kind, match=said):
        setattr(learner, name, value)
    learner.meta_gradient(regression_batch())


def test_a_model_of_the_same_parameters_may_take_its_place():
    batch = regression_batch(tasks=3)
    learner = MAML(net(), F.mse_loss, inner_lr=0.1)
    other = copy.deepcopy(learner.model)
    nn.init.normal_(other[0].weight)
    learner.model = other
    assert_close(means(learner, batch), means(MAML(other, F.mse_loss, inner_lr=0.1), batch))


def test_a_tracked_learner_keeps_to_one_step():
    learner = MAML(net(), F.mse_loss, estimator="moml")
    with pytest.raises(ValueError, match="averages the results of one inner step"):
        learner.inner_steps = 2


def test_step_sizes_are_set_after_the_trainable_parameters_have_changed():
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    model[0].bias.requires_grad_(False)
    learner = MAML(model, F.mse_loss, inner_lr=0.1)
    model[0].bias.requires_grad_(True)
    learner.inner_lr = 0.2
    assert learner.inner_lr == 0.2
    model[2].bias.requires_grad_(False)
    sizes = {"0.weight": 0.1, "0.bias": 0.2, "2.weight": 0.3}
    learner.inner_lr = sizes
    model[2].bias.requires_grad_(True)
    assert learner.meta_parameters().keys() == set(NAMES)
    assert learner.inner_lr == {**sizes, "2.bias": 0.2}
