"""Models with some normalisation layers in ``eval()`` and others in training mode: each does what its own mode says."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from as_in_a_loop import Given
from normalised_models import INNER_LR, TASKS, loop, with_statistics
from problems import WAYS, assert_close, labelled_batch, randomised
from slow_maml import slow_meta_gradient
from torch import Tensor, nn
from torch.nn import functional as F

from metamom import MAML, evaluate
from metamom.baselines.per_task import frozen_copy
from metamom.common.choices import STATISTICS_OF
from metamom.experiments.python_runs import learner_of
from metamom.maml.normalisation.norm import as_setting, resolved
from metamom.nets.layers import BatchNormReLU
from metamom.nets.statistics import uses_running_statistics

ONES = torch.ones(5)


class ByHand(nn.BatchNorm1d):
    """As papers' code writes it."""

    def forward(self, x: Tensor) -> Tensor:
        mean, variance = (
            (x.mean(0), x.var(0, unbiased=False)) if self.training else (self.running_mean, self.running_var)
        )
        return (x - mean) * torch.rsqrt(variance + self.eps) * self.weight + self.bias


class Functional(nn.Module):
    """Calls the function with the statistics and the mode of a layer that it does not call."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.training)


class Fixed(nn.Module):
    """Frozen by hand: it calls the function with statistics of its own, in every mode."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, training=False)


def normalised_by(x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    return F.batch_norm(x, mean.to(x), variance.to(x), training=False)


class FixedByHelper(Fixed):
    """The same by a function outside of the class."""

    def forward(self, x: Tensor) -> Tensor:
        return normalised_by(x, self.running_mean, self.running_var)


class ByFunction(nn.Module):
    """Calls a function that it was given."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def by_mode_of(x: Tensor, norm: nn.BatchNorm1d) -> Tensor:
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.training)


class ByHelper(Functional):
    """By hand, in a function that reads the mode of the module that it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return by_mode_of(x, self.norm)


class OfThis(nn.Module):
    """Normalises by a function, without statistics."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, training=True)


def materialised() -> nn.Module:
    norm = nn.LazyBatchNorm1d()
    norm(torch.zeros(2, 5))
    return norm


def vectors(stem: nn.Module, last: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), stem, nn.Tanh(), nn.Linear(5, 5), last, nn.Tanh(), nn.Linear(5, WAYS))


def images(stem: nn.Module, last: nn.Module) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), stem, nn.Tanh(), nn.Conv2d(4, 3, 3), last, nn.Tanh(), nn.Flatten(), nn.Linear(12, WAYS)
    )


MAKE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1d": (lambda: vectors(nn.BatchNorm1d(5), nn.BatchNorm1d(5)), (4,)),
    "2d": (lambda: images(nn.BatchNorm2d(4), nn.BatchNorm2d(3, momentum=None)), (1, 6, 6)),
    "synchronised": (lambda: vectors(nn.SyncBatchNorm(5), nn.SyncBatchNorm(5)), (4,)),
    "lazy": (lambda: vectors(materialised(), materialised()), (4,)),
    "no affine weights": (lambda: vectors(nn.BatchNorm1d(5, affine=False), nn.BatchNorm1d(5, affine=False)), (4,)),
    "without statistics in the head": (
        lambda: vectors(nn.BatchNorm1d(5), nn.BatchNorm1d(5, track_running_stats=False)), (4,)
    ),
    "instances": (
        lambda: images(
            nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
            nn.InstanceNorm2d(3, affine=True, track_running_stats=True),
        ), (1, 6, 6)
    ),
    "instances and a batch": (
        lambda: images(nn.InstanceNorm2d(4, track_running_stats=True), nn.BatchNorm2d(3)), (1, 6, 6)
    ),
    "by hand": (lambda: vectors(ByHand(5), ByHand(5)), (4,)),
    "functions": (lambda: vectors(Functional(), Functional()), (4,)),
    "fixed by hand": (lambda: vectors(Fixed(5), nn.BatchNorm1d(5)), (4,)),
    "fixed by a helper": (lambda: vectors(FixedByHelper(5), nn.BatchNorm1d(5)), (4,)),
    "fixed by a function": (
        lambda: vectors(ByFunction(partial(normalised_by, mean=ONES, variance=ONES)), nn.BatchNorm1d(5)), (4,)
    ),
    "by hand in a helper": (lambda: vectors(ByHelper(), ByHelper()), (4,)),
    "a function in the head": (lambda: vectors(nn.BatchNorm1d(5), OfThis()), (4,)),
    "beside metamom's own": (
        lambda: nn.Sequential(
            nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 5), BatchNormReLU(5), nn.Linear(5, WAYS)
        ), (4,)
    ),
}  # fmt: skip


def case(name: str) -> tuple[nn.Module, Any]:
    """A model with its first normalisation in ``eval()``."""
    make, shape = MAKE[name]
    model = with_statistics(randomised(make()))
    model[1].eval()
    return model, labelled_batch(*shape)


def plain(model: nn.Module) -> nn.Module:
    """A copy that PyTorch can differentiate twice: layers in training mode do not write running statistics."""
    found = copy.deepcopy(model)
    for module in found.modules():
        if uses_running_statistics(module) and module.training and not isinstance(module, ByHand):
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None
    return found


@pytest.mark.parametrize("vectorize", ["auto", "vmap", "loop"])
@pytest.mark.parametrize("name", MAKE)
def test_meta_gradients_are_those_of_a_plain_loop(name, vectorize):
    model, batch = case(name)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    learner = MAML(model, F.cross_entropy, inner_lr=INNER_LR, inner_steps=2, vectorize=vectorize)
    expected, losses = slow_meta_gradient(plain(model), F.cross_entropy, batch, steps=2, inner_lr=INNER_LR)
    for _ in range(3):  # the fast paths begin with the second
        found = learner.meta_gradient(batch)
        torch.testing.assert_close(found.losses, losses, rtol=1e-9, atol=1e-9)
        assert_close({name: grad[0] for name, grad in found.grads.items()}, expected, 1e-9)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert not any({"running_mean", "num_batches_tracked"} & module.__dict__.keys() for module in model.modules())


@pytest.mark.parametrize("name", MAKE)
def test_evaluations_use_what_training_does(name):
    model, batch = case(name)
    learner = MAML(model, F.cross_entropy, inner_lr=INNER_LR)
    _, losses = slow_meta_gradient(plain(model), F.cross_entropy, batch, inner_lr=INNER_LR)
    result = evaluate(learner, Given(batch), tasks=TASKS, steps=(1,), metric="loss")
    torch.testing.assert_close(result.values[0].double(), losses.double(), rtol=1e-6, atol=1e-6)
    assert result.norm == ("batch" if name.startswith("fixed") else "mixed")
    assert STATISTICS_OF[result.norm] in repr(result)
    adapted = learner.adapt(batch.support_x, batch.support_y)
    torch.testing.assert_close(
        learner.judge(adapted, learner.predict(adapted, batch.query_x), batch.query_y)[0], losses
    )


@pytest.mark.parametrize("compile", [False, True])
def test_a_layer_that_changes_its_mode_is_followed(traced, compile):
    model, batch = case("1d")
    learner = MAML(model, F.cross_entropy, inner_lr=INNER_LR, compile=compile)
    for training in ((False, True), (True, False), (False, False), (True, True), (False, True)):
        model[1].train(training[0])
        model[4].train(training[1])
        expected, losses = slow_meta_gradient(plain(model), F.cross_entropy, batch, inner_lr=INNER_LR)
        found = learner.meta_gradient(batch)
        torch.testing.assert_close(found.losses, losses, rtol=1e-9, atol=1e-9)
        assert_close({name: grad[0] for name, grad in found.grads.items()}, expected, 1e-9)


@pytest.mark.parametrize("norm", ["batch", "frozen", "support"])
def test_a_choice_for_all_layers_is_one_for_all(norm):
    model, batch = case("2d")
    found = MAML(model, F.cross_entropy, inner_lr=INNER_LR, norm=norm).meta_gradient(batch)
    _, losses = loop("2d", model, norm).meta_gradient(model, batch)
    torch.testing.assert_close(found.losses, losses, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["1d", "2d", "instances and a batch"])
def test_a_fitted_module_keeps_frozen_statistics_and_those_of_the_support_set(name):
    model, batch = case(name)
    learner = MAML(model, F.cross_entropy, inner_lr=INNER_LR)
    x, y, queries = batch.support_x[0], batch.support_y[0], batch.query_x[0]
    module = learner.fit(x, y)
    adapted = learner.adapt(batch.support_x, batch.support_y)
    reference = plain(model)
    with torch.no_grad():
        for key, p in reference.named_parameters():
            p.copy_(adapted[key][0])
        torch.testing.assert_close(module(x), reference(x), rtol=1e-6, atol=1e-9)  # its own statistics are the set's
        torch.testing.assert_close(module(queries)[:1], module(queries[:1]))
    torch.testing.assert_close(module(queries), learner.fit_predict(x, y, queries), rtol=1e-6, atol=1e-9)
    assert torch.equal(module[1].running_mean, model[1].running_mean)


def test_baselines_and_runs_normalise_in_the_same_way():
    model, batch = case("1d")
    x = batch.query_x[0]
    assert torch.allclose(frozen_copy(model, None)(x), plain(model)(x))
    setting = as_setting(resolved(model, None))
    assert setting == {"frozen": ["1"], "others": "batch"}
    again = copy.deepcopy(model).train()
    learner = MAML(model, F.cross_entropy)
    settings = {"learner": learner.describe(), "normalisation": setting}
    assert as_setting(resolved(learner_of(settings, {}, again, F.cross_entropy).model, None)) == setting
    with pytest.raises(ValueError, match=r"which the model does not have: 1\. Give the model of the run"):
        learner_of(settings, {}, nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, WAYS)), F.cross_entropy)
