"""A resumed run has the same loss: functions, modules and lambdas are compared."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from directory_runs import go, learner, refused
from torch import nn
from torch.nn import functional as F

from metamom.training.contents import Contents
from metamom.training.directory import read_config


def huber(predictions: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.huber_loss(predictions, y)


@pytest.mark.parametrize(
    ("there", "here", "message"),
    [
        (F.mse_loss, F.l1_loss, "loss.name is 'mse_loss' there and 'l1_loss' here"),
        (nn.MSELoss(), nn.MSELoss(reduction="sum"), "loss.reduction is 'mean' there and 'sum' here"),
        (functools.partial(F.huber_loss, delta=1.0), functools.partial(F.huber_loss, delta=2.0), "loss.delta is 1.0"),
        (huber, nn.HuberLoss(), r"loss.name is 'huber' there and 'HuberLoss\(\)' here"),
    ],
)
def test_another_loss(there, here, message, tmp_path):
    go(tmp_path, learner(there))
    refused(tmp_path, message, lambda: go(tmp_path, learner(here), resume=True))
    go(tmp_path, learner(there), resume=True)


class Power:
    def __init__(self, p: int) -> None:
        self.p = p

    def __call__(self, predictions: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (predictions - y).abs().pow(self.p).mean()


class Around(nn.Module):
    """A loss with a child and a buffer."""

    def __init__(self, scale: float = 1.0, delta: float = 1.0) -> None:
        super().__init__()
        self.child = nn.HuberLoss(delta=delta)
        self.register_buffer("scale", torch.tensor([scale]))

    def forward(self, predictions: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.scale.mean() * self.child(predictions, y)


def power_of(p: int) -> Any:
    def loss(predictions: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (predictions - y).abs().pow(p).mean()

    return loss


def with_default(p: int) -> Any:
    return lambda predictions, y, p=p: (predictions - y).abs().pow(p).mean()


def weighted(weight: float) -> Any:
    return functools.partial(weigh, torch.tensor([weight]))


def weigh(weight: torch.Tensor, predictions: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (weight * (predictions - y).square()).mean()


OTHER_CONTENTS: dict[str, tuple[Callable[[], Any], Callable[[], Any], str]] = {
    "a child": (Around, lambda: Around(delta=3.0), r"contents\.loss\.child\.delta is 1\.0 there and 3\.0 here"),
    "a buffer": (Around, lambda: Around(2.0), r"contents\.loss\.scale is 'torch.float32 of shape \(1,\), "),
    "an attribute": (lambda: Power(2), lambda: Power(3), r"contents\.loss\.p is 2 there and 3 here"),
    "a closure": (lambda: power_of(2), lambda: power_of(3), r"contents\.loss\.closure\.p is 2 there and 3 here"),
    "a default": (lambda: with_default(2), lambda: with_default(3), r"contents\.loss\.defaults\.p is 2 there and 3"),
    "a tensor of a partial function": (lambda: weighted(1.0), lambda: weighted(2.0), r"contents\.loss\.0 is 'torch"),
    "code": (
        lambda: lambda predictions, y: (predictions - y).abs().mean(),
        lambda: lambda predictions, y: (predictions - y).square().mean(),
        r"code\[0\] is ",
    ),
    "a constant": (
        lambda: lambda predictions, y: (2.0 * (predictions - y)).abs().mean(),
        lambda: lambda predictions, y: (3.0 * (predictions - y)).abs().mean(),
        r"code\[0\] is ",
    ),
}


@pytest.mark.parametrize("what", OTHER_CONTENTS)
def test_another_loss_of_the_same_name(what, tmp_path):
    there, here, message = OTHER_CONTENTS[what]
    go(tmp_path, learner(there()), iterations=2)
    refused(tmp_path, message, lambda: go(tmp_path, learner(here()), resume=True))
    go(tmp_path, learner(there()), resume=True)


def test_weights_of_classes_are_compared():
    """They are a module's buffer, which its name does not show."""
    one, same, other = (nn.CrossEntropyLoss(weight=torch.tensor([1.0, w])) for w in (2.0, 2.0, 3.0))
    assert Contents(one).values == Contents(same).values != Contents(other).values


def test_a_lambda_of_the_same_code_is_the_same(tmp_path):
    def elsewhere() -> Any:
        return lambda predictions, y: (predictions - y).square().mean()

    go(tmp_path, learner(lambda predictions, y: (predictions - y).square().mean()), iterations=2)
    go(tmp_path, learner(elsewhere()), resume=True)


def test_a_trained_loss_is_the_same_and_one_that_holds_itself_ends():
    """What training moves does not decide a run."""
    module = nn.PReLU()
    before = Contents(module).values
    with torch.no_grad():
        module.weight.add_(1.0)
    assert Contents(module).values == before
    power = Power(2)
    power.me = power  # type: ignore[attr-defined]
    assert Contents(power).values == [{"kind": "Power", "p": 2, "me": "itself"}]


def test_code_is_compared_within_one_version_of_python(tmp_path):
    go(tmp_path, learner(power_of(2)), iterations=2)
    config = read_config(tmp_path)
    config["settings"]["code"], config["environment"]["python"] = ["of another", None], "3.1.4"
    (tmp_path / "config.json").write_text(json.dumps(config))
    go(tmp_path, learner(power_of(2)), resume=True)


def test_another_function_as_bias(tmp_path):
    def scaled(factor: float) -> Any:
        return lambda gradient: factor * gradient

    go(tmp_path, bias=scaled(0.5), iterations=2)
    message = r"contents\.bias\[0\]\.closure\.factor is 0\.5 there"
    refused(tmp_path, message, lambda: go(tmp_path, bias=scaled(0.7), resume=True))
    message = r"code\[1\] is "
    refused(tmp_path, message, lambda: go(tmp_path, bias=lambda gradient: gradient.sign(), resume=True))
    go(tmp_path, bias=scaled(0.5), resume=True)
