"""`torch.set_default_dtype` of a user changes neither what is drawn nor what is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from problems import noise
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from metamom import BOIL, MAML, CompositeMomentum, ProtoMAML, Reptile, TaskBatch, evaluate, pad, train
from metamom.nets import Conv4
from metamom.tasks import Episodes, LinearRegression, Quadratic, Sinusoid

DTYPES = (torch.float32, torch.float64)
SPECS = (
    "topk:50%", "randk:50%", "qsgd:4", "sign", "clip:1.0", "natural", "terngrad", "block8", "powersgd:1", "noise:0.1",
    "ef14:topk:50%",
)  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "two steps": {"inner_steps": 2, "multi_step": 3},
    "cross-fit": {"estimator": "cross-fit"},
    "hessian-free": {"estimator": "hessian-free"},
    "implicit": {"estimator": "implicit"},
    "perturbed": {"estimator": "perturbed"},
    "learned step sizes": {"learn_inner_lr": "tensor-step", "positive_inner_lr": True, "inner_steps": 2},
    "adam": {"inner_optimizer": "adam"},
}
SAMPLERS = {
    "sinusoid": Sinusoid(shots=4),
    "regression": LinearRegression(dim=3, shots=4),
    "quadratic": Quadratic(dim=3),
}


@contextmanager
def default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def net(dtype: torch.dtype) -> nn.Module:
    model = nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 1)).to(dtype)
    for number, p in enumerate(model.parameters()):
        p.data = noise(*p.shape, seed=number, dtype=dtype)
    return model


def assert_same(compute: Callable[[], Any]) -> None:
    """The same bits, dtypes included, under either default."""
    found = []
    for dtype in DTYPES:
        with default(dtype):
            torch.manual_seed(0)
            found.append(pytree.tree_leaves(compute()))
    for one, other in zip(*found, strict=True):
        if isinstance(one, Tensor):
            assert one.dtype == other.dtype
            assert torch.equal(one, other)
        else:
            assert one == other


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_draw_the_same(name):
    assert_same(lambda: tuple(SAMPLERS[name].sample(3, 2)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", SPECS)
def test_operators_and_momentum(spec, dtype):
    def steps() -> Any:
        model = net(dtype)
        learner, optimizer = MAML(model, F.mse_loss), CompositeMomentum(model.parameters(), lr=0.05, beta=0.1)
        for step in range(2):
            optimizer.zero_grad()
            learner.backward(SAMPLERS["sinusoid"].sample(step, 4).to(dtype=dtype), bias=spec, workers=2)
            optimizer.step()
        return [p.detach() for p in model.parameters()]

    assert_same(steps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPTIONS)
def test_meta_gradients_and_evaluation(name, dtype):
    def compute() -> Any:
        learner = MAML(net(dtype), F.mse_loss, **OPTIONS[name])
        batch = SAMPLERS["sinusoid"].sample(0, 3).to(dtype=dtype)
        learner.backward(batch)
        result = evaluate(learner, SAMPLERS["sinusoid"], tasks=3, steps=(0, 1))
        return gradients(learner), result.values, learner.fit_predict(*(x[0] for x in batch[:3]))

    assert_same(compute)


@pytest.mark.parametrize("dtype", DTYPES)
def test_padded_tasks(dtype):
    def compute() -> Any:
        batch = SAMPLERS["sinusoid"].sample(0, 3).to(dtype=dtype)
        learner = MAML(net(dtype), F.mse_loss)
        learner.backward(pad([TaskBatch(*(x[t : t + 1, : t + 2] for x in batch[:4])) for t in range(3)]))
        return gradients(learner)

    assert_same(compute)


@pytest.mark.parametrize("dtype", DTYPES)
def test_classifiers_of_every_kind(dtype):
    data = noise(12, 4, dtype=torch.float32), torch.arange(12) % 4
    images = noise(2, 3, 1, 16, 16, dtype=dtype), torch.arange(3).repeat(2, 1)

    def compute() -> Any:
        batch = Episodes(*data, ways=2, shots=2, queries=1).sample(0, 2).to(dtype=dtype)
        found = []
        for kind in (MAML, Reptile, ProtoMAML, BOIL):
            model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).to(dtype)
            for number, p in enumerate(model.parameters()):
                p.data = noise(*p.shape, seed=number, dtype=dtype)
            kind(model, F.cross_entropy).backward(batch)
            found.append(gradients(model))
        network = Conv4(ways=3, hidden=2).to(dtype)
        for number, p in enumerate(network.parameters()):
            p.data = noise(*p.shape, seed=number, dtype=dtype)
        MAML(network, F.cross_entropy).backward(TaskBatch(*images, *images))
        return [*found, gradients(network)]

    assert_same(compute)


@pytest.mark.parametrize("dtype", DTYPES)
def test_runs(dtype, tmp_path):
    def compute() -> Any:
        learner = MAML(net(dtype), F.mse_loss)
        optimizer = CompositeMomentum(learner.parameters(), lr=0.05, beta=0.1)
        train(learner, optimizer, SAMPLERS["sinusoid"], iterations=3, meta_batch=2, bias="topk:50%")
        return [p.detach() for p in learner.parameters()]

    assert_same(compute)
