"""Layers that normalise by a forward of their own: what ``norm`` cannot act on is refused, what it can is exact."""

from __future__ import annotations

import pytest
import torch
from as_in_a_loop import Given
from normalised_models import INNER_LR, TASKS, loop, with_statistics
from problems import WAYS, assert_close, labelled_batch, randomised
from torch import Tensor, nn
from torch.nn import functional as F

from metamom import MAML, evaluate


class ByHand(nn.BatchNorm1d):
    """As papers' code writes it."""

    def forward(self, x: Tensor) -> Tensor:
        mean, variance = (
            (x.mean(0), x.var(0, unbiased=False)) if self.training else (self.running_mean, self.running_var)
        )
        return (x - mean) * torch.rsqrt(variance + self.eps) * self.weight + self.bias


class Calls(nn.BatchNorm1d):
    """Does something else besides, as layers with an activation do."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.double())


class Writes(nn.Module):
    """Calls the function with running statistics of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Linear(4, 5)
        self.register_buffer("mean", torch.zeros(5))
        self.register_buffer("variance", torch.ones(5))
        self.head = nn.Linear(5, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.batch_norm(self.norm(x), self.mean, self.variance, training=self.training))


def network(kind: type[nn.BatchNorm1d], *, training: bool) -> nn.Module:
    model = randomised(nn.Sequential(nn.Linear(4, 5), kind(5), nn.Tanh(), nn.Linear(5, WAYS)).double())
    return with_statistics(model).train(training)


@pytest.mark.parametrize(
    ("norm", "training"), [("support", True), ("support", False), ("frozen", True), ("batch", False)]
)
@pytest.mark.parametrize("vectorize", ["auto", "loop"])
def test_a_choice_without_effect_is_refused(norm, training, vectorize):
    model = network(ByHand, training=training)
    learner = MAML(model, F.cross_entropy, norm=norm, vectorize=vectorize)
    does = "batch" if training else "frozen"
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"norm='{norm}' replaces .* ByHand .* as '{does}'"):
            learner.backward(labelled_batch(4))
    assert not model[1]._forward_hooks
    assert not model[1]._forward_pre_hooks


def test_an_evaluation_in_another_mode_is_refused():
    """It would use running statistics that no step has updated."""
    learner = MAML(network(ByHand, training=True), F.cross_entropy)
    batch = labelled_batch(4)
    learner.backward(batch)
    with pytest.raises(ValueError, match="ByHand normalises by a forward of its own, here as 'frozen'"):
        evaluate(learner, Given(batch), tasks=TASKS)


@pytest.mark.parametrize("kind", [ByHand, Calls])
@pytest.mark.parametrize(("norm", "training"), [("batch", True), ("frozen", False), (None, True), (None, False)])
def test_what_it_does_anyway_is_that_of_a_loop(kind, norm, training):
    model, batch = network(kind, training=training), labelled_batch(4)
    learner = MAML(model, F.cross_entropy, inner_lr=INNER_LR, norm=norm)
    expected, losses = loop("", model, norm or ("batch" if training else "frozen")).meta_gradient(model, batch)
    for _ in range(3):
        found = learner.meta_gradient(batch)
        torch.testing.assert_close(found.losses, losses, rtol=1e-10, atol=1e-10)
        assert_close({name: grad[0] for name, grad in found.grads.items()}, expected, 1e-10)


@pytest.mark.parametrize("norm", ["batch", "frozen", "support"])
def test_a_layer_that_calls_pytorchs_forward_takes_every_choice(norm):
    model, batch = network(Calls, training=True), labelled_batch(4)
    found = MAML(model, F.cross_entropy, inner_lr=INNER_LR, norm=norm).meta_gradient(batch)
    expected, losses = loop("", model, norm).meta_gradient(model, batch)
    torch.testing.assert_close(found.losses, losses, rtol=1e-10, atol=1e-10)
    assert_close({name: grad[0] for name, grad in found.grads.items()}, expected, 1e-10)


@pytest.mark.parametrize("vectorize", ["auto", "loop"])
def test_statistics_that_a_function_writes_to_have_a_choice(vectorize):
    model, batch = randomised(Writes().double()), labelled_batch(4)
    with pytest.raises(ValueError, match=r'changed in place: mean, variance\. If .* pass norm="batch"'):
        MAML(model, F.cross_entropy, vectorize=vectorize).backward(batch)
    assert torch.isfinite(MAML(model, F.cross_entropy, vectorize=vectorize, norm="batch").backward(batch).loss)
