"""Modules and parameters that are registered in several places: they train, and stay what they are."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from problems import assert_close, regression_batch
from slow_maml import meta_gradient_by_copies
from torch import Tensor, nn
from torch.nn import functional as F

from metamom import MAML, CompositeMomentum, evaluate
from metamom.tasks import Sinusoid


class UnderTwoNames(nn.Module):
    """As learn2learn's OmniglotCNN keeps its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(2, 4)
        self.features = nn.Sequential(self.base, nn.Tanh())
        self.head = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class TwiceInOneSequential(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        hidden = nn.Linear(4, 4)
        self.layers = nn.Sequential(nn.Linear(2, 4), hidden, nn.Tanh(), hidden, nn.Tanh(), nn.Linear(4, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class TiedWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(2, 4), nn.Linear(2, 4), nn.Linear(4, 1)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.first(x)) * self.second(x))


class TwoNamesAndTied(UnderTwoNames):
    def __init__(self) -> None:
        super().__init__()
        self.again = self.features
        self.weight = self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.again(x @ self.weight.T @ self.weight).mean(1, keepdim=True)


class SharedBuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(2.0))
        self.body = UnderTwoNames()
        self.body.register_buffer("scale", self.scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x * self.scale) * self.body.scale


MODELS = (UnderTwoNames, TwiceInOneSequential, TiedWeights, TwoNamesAndTied, SharedBuffer)


def problem(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind().double()


def registered(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor at every place."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


@pytest.mark.parametrize("kind", MODELS)
def test_every_step_is_that_of_a_loop(kind):
    model = problem(kind)
    before = registered(model)
    learner = MAML(model, F.mse_loss, inner_lr=0.1)
    optimizer = CompositeMomentum(learner.parameters(), lr=0.1, beta=1.0)
    for step in range(3):
        batch = regression_batch(tasks=3, seed=step)
        expected = meta_gradient_by_copies(model, F.mse_loss, batch, inner_lr=0.1)
        optimizer.zero_grad()
        learner.backward(batch)
        assert_close({name: p.grad for name, p in model.named_parameters()}, expected)
        optimizer.step()
    after = registered(model)
    assert set(before) == set(after)
    assert all(after[name] is before[name] for name in before)
    assert all(type(p) is nn.Parameter for p in model.parameters())


@pytest.mark.parametrize("kind", MODELS)
def test_whatever_is_called_the_model_stays(kind):
    model = problem(kind)
    before = registered(model)
    batch = regression_batch(tasks=3)
    learner = MAML(model, F.mse_loss, inner_lr=0.1)
    learner.losses(batch)
    params = learner.adapt(batch.support_x, batch.support_y)
    learner.predict(params, batch.query_x)
    learner.meta_gradient(batch)
    assert all(tensor is before[name] for name, tensor in registered(model).items())
    pickle.loads(pickle.dumps(model))
    copy.deepcopy(learner)


def test_after_an_error_the_model_stays():
    model = problem(TwoNamesAndTied)
    before = registered(model)
    learner = MAML(model, F.mse_loss)
    batch = regression_batch(tasks=2)
    with pytest.raises((ValueError, RuntimeError)):
        learner.losses(batch._replace(support_x=batch.support_x[..., :1]))
    assert all(tensor is before[name] for name, tensor in registered(model).items())


def test_evaluation_leaves_the_model_as_it_was():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 4), nn.Dropout(0.5), nn.Linear(4, 1))
    model[1].eval()
    modes = [module.training for module in model.modules()]
    before = registered(model)
    evaluate(MAML(model, F.mse_loss), Sinusoid(), tasks=4, steps=(0, 1))
    assert [module.training for module in model.modules()] == modes
    assert all(tensor is before[name] for name, tensor in registered(model).items())


def test_a_compiled_learner_trains_every_parameter(traced):
    model = problem(TwoNamesAndTied)
    learner = MAML(model, F.mse_loss, inner_lr=0.1, compile=True)
    batch = regression_batch(tasks=3)
    for _ in range(2):
        learner.zero_grad()
        learner.backward(batch)
        assert_close(
            {name: p.grad for name, p in model.named_parameters()},
            meta_gradient_by_copies(model, F.mse_loss, batch, inner_lr=0.1),
        )
    assert len(traced) == 1
