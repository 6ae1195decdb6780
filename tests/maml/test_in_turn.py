"""Tests of `metamom.maml.in_turn`: the loop that differentiates one task at a time, against the loop over all tasks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metamom import MAML, TaskBatch
from metamom.maml import chunk_gradient, in_turn
from metamom.maml.functions_by_task import may_call_them


def batch(tasks: int = 4) -> TaskBatch:
    generator = torch.Generator().manual_seed(1)

    def one() -> tuple[Tensor, Tensor]:
        x = torch.randn(tasks, 5, 3, generator=generator, dtype=torch.float64)
        return x, torch.randint(2, (tasks, 5), generator=generator)

    return TaskBatch(*one(), *one())


class Partly(nn.Module):
    """Uses one of its layers for some tasks only, and another one for none."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.unused = (nn.Linear(3, 2) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.first(x)
        return out + self.second(x) if x[0, 0] > 0 else out


def _tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Linear(3, 2))
    model[2].weight = model[0].weight
    return model


MODELS = {
    "mlp": lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)),
    "dropout": lambda: nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 2)),
    "batch norm": lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)),
    "tied": _tied,
    "partly used": Partly,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "exact": {},
    "first order": {"estimator": "first-order"},
    "two steps": {"inner_steps": 2},
    "momentum": {"inner_steps": 2, "inner_optimizer": "momentum:0.9"},
    "head": {"adapt": lambda name: not name.startswith(("0", "first"))},
}


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call of `in_turn` came to its end."""
    calls: list[bool] = []

    def watched(*args: Any) -> in_turn.InTurn:
        calls.append(False)
        found = in_turn.in_turn(*args)
        calls[-1] = True
        return found

    monkeypatch.setattr(chunk_gradient, "in_turn", watched)
    return calls


def found(learner: MAML, workers: int) -> tuple[dict[str, Tensor], Tensor]:
    torch.manual_seed(5)
    return learner.meta_gradient(batch(), workers=workers)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", MODELS)
def test_it_is_the_other_loop(name, options, ran):
    """The first call goes through the other loop, with the same weights, tasks and draws."""
    torch.manual_seed(0)
    model = MODELS[name]().double()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    learner = MAML(model, F.cross_entropy, inner_lr=0.1, vectorize="loop", **options)
    expected, losses = found(learner, workers=2)
    assert not ran
    grads, again = found(learner, workers=2)
    assert ran == [True]
    torch.testing.assert_close(again, losses, rtol=1e-12, atol=0)
    for key, gradient in expected.items():
        torch.testing.assert_close(
            grads[key], gradient, rtol=1e-10, atol=1e-14, msg=lambda text, key=key: f"{key} {text}"
        )
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_model_that_fails_there_is_computed_by_the_other_loop(ran):
    """From then on, at once; its draws are taken back."""

    class Late(nn.Linear):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            out = super().forward(x)
            return out + 0.0 * torch.rand(2, dtype=x.dtype) if self.calls > 16 else out

    learner = MAML(Late(3, 2).double(), F.cross_entropy, vectorize="loop")
    first, _ = found(learner, 1)
    for finished in ([True], [True, False], [True, False]):
        learner.model.calls = 8 * len(finished) + 8 * (len(finished) > 1)
        grads, _ = found(learner, 1)
        assert ran == finished
        torch.testing.assert_close(grads["weight"], first["weight"], rtol=1e-10, atol=1e-14)


def test_an_error_is_explained_and_does_not_last(ran):
    learner = MAML(nn.Linear(3, 2).double(), F.cross_entropy, vectorize="loop")
    found(learner, 1)
    wrong = batch()._replace(query_x=torch.zeros(4, 5, 7, dtype=torch.float64))
    with pytest.raises(ValueError, match="the model cannot take inputs of shape"):
        learner.meta_gradient(wrong)
    found(learner, 1)
    assert ran == [False, True]


def test_a_module_named_like_a_function_is_not_that_function():
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.embedding(x)
            return out

    class Function(Own):
        def forward(self, x: Tensor) -> Tensor:
            return F.embedding(x, self.embedding.weight, max_norm=1.0)

    assert not may_call_them(Own(), loop=True)
    assert may_call_them(Function(), loop=True)
