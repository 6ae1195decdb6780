"""PyTorch's search for anomalies: compiled learners run eagerly meanwhile, and it finds what it is meant to find."""

from __future__ import annotations

import warnings

import pytest
import torch
from problems import assert_close, labelled_batch, randomised
from slow_maml import slow_meta_gradient
from torch import Tensor, nn
from torch.nn import functional as F

from metamom import MAML


def network() -> nn.Module:
    return randomised(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))


def test_a_compiled_learner_runs_eagerly_meanwhile(traced):
    model, batch = network(), labelled_batch(4)
    expected, _ = slow_meta_gradient(model, F.cross_entropy, batch, inner_lr=0.1)
    learner = MAML(model, F.cross_entropy, inner_lr=0.1, compile=True)
    for anomalies, compilations in ((True, 0), (False, 1), (True, 1), (False, 1)):
        with torch.autograd.set_detect_anomaly(anomalies):
            if anomalies and not compilations:
                with pytest.warns(UserWarning, match="set_detect_anomaly looks at eager backward passes"):
                    found = learner.meta_gradient(batch)
            found = learner.meta_gradient(batch)
        assert_close({key: grad[0] for key, grad in found.grads.items()}, expected, 1e-9)
        assert len(traced) == compilations


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("vectorize", ["auto", "loop"])
def test_it_finds_the_function_without_a_derivative(traced, compile, vectorize):
    class Root(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (0 * x).sqrt() * 0 + x

    model, batch = nn.Sequential(network(), Root()), labelled_batch(4)
    learner = MAML(model, F.cross_entropy, compile=compile, vectorize=vectorize)
    for _ in range(2):
        with torch.autograd.set_detect_anomaly(True), warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            with pytest.raises(RuntimeError, match="returned nan values"):
                learner.backward(batch)
        assert any("Error detected in" in str(each.message) for each in said)
