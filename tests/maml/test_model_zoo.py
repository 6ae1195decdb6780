"""Other people's models against a loop over tasks: the gradient, a second step, and the model afterwards."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from as_in_a_loop import INNER_LR, SMALL, check, state_of
from model_libraries import FIRST_ORDER_TORCHVISION, LARGE_LEARN2LEARN, LEARN2LEARN, SMALL_TORCHVISION, TORCHVISION
from model_zoo import FIRST_ORDER, REFUSED, ZOO, images, problem, words
from problems import assert_close
from processes import SUPPORT
from slow_maml import slow_meta_gradient
from small_models import WAYS, bag
from torch import Tensor, nn
from torch.nn import functional as F

from metamom import MAML
from metamom.maml.estimators import Estimator

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*weight_norm.* is deprecated:FutureWarning",
    "ignore:There is a performance drop because we have not yet implemented:UserWarning",  # vmap goes through a loop
    "ignore:Lazy modules are a new feature:UserWarning",
    "ignore:.*torch.jit.*deprecated:DeprecationWarning",
    "ignore:enable_nested_tensor is True:UserWarning",
)


@pytest.mark.parametrize("name", ZOO)
def test_a_model_trains_as_in_a_loop(name):
    check(ZOO[name]())


@pytest.mark.parametrize("name", FIRST_ORDER)
def test_a_model_without_second_derivatives_trains_by_first_order(name):
    check(FIRST_ORDER[name](), estimator="first-order")


@pytest.mark.parametrize("name", [n for i, n in enumerate(ZOO) if i % 4 == 0])
def test_a_model_trains_as_in_a_loop_over_two_inner_steps(name):
    check(ZOO[name](), steps=2)


@pytest.mark.parametrize("name", [n for i, n in enumerate(ZOO) if i % 3 == 0])
def test_a_model_trains_task_by_task(name):
    check(ZOO[name](), vectorize="loop")


@pytest.mark.parametrize("vectorize", ["vmap", "loop"])
@pytest.mark.parametrize("options", [{"mode": "sum"}, {"mode": "mean", "padding_idx": 1}, {"mode": "max"}])
def test_bags_of_embeddings_have_second_derivatives(options, vectorize):
    """PyTorch's own do not, so the loop to compare with looks up the words and reduces them."""
    model, loss_fn, batch = problem(bag(**options), words(5), WAYS)
    written_out = copy.deepcopy(model)
    padding = options.get("padding_idx", -1)

    def reduce(self: nn.EmbeddingBag, x: Tensor) -> Tensor:
        found, counted = self.weight[x], (x != padding).unsqueeze(-1)
        found = torch.where(counted, found, found.detach())
        if self.mode == "max":
            return found.max(1).values
        total = (found * counted).sum(1)
        return total if self.mode == "sum" else total / counted.sum(1)

    written_out[0].forward = reduce.__get__(written_out[0])
    expected = slow_meta_gradient(written_out, loss_fn, batch, inner_lr=INNER_LR, steps=2)[0]
    learner = MAML(model, loss_fn, inner_lr=INNER_LR, inner_steps=2, vectorize=vectorize)
    assert_close({name: g[0] for name, g in learner.meta_gradient(batch).grads.items()}, expected)


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_cannot_be_right_is_refused(name):
    make, said = REFUSED[name]
    model, loss_fn, batch = make()
    before = state_of(model)
    with pytest.raises((ValueError, TypeError), match=said):
        MAML(model, loss_fn, inner_lr=INNER_LR, vectorize="vmap").backward(batch)
    assert state_of(model) == before


def test_the_zoo_is_large():
    assert len(ZOO) >= 40


def test_old_weight_norm_is_as_the_new_one():
    """Its hook leaves the weight in an attribute, which a copy of the model cannot have."""
    new = ZOO["weight norm"]()
    old = problem(lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.utils.weight_norm(nn.Linear(6, 6)),
                                        nn.Linear(6, 1)), images(4), 0)  # fmt: skip
    names = {"2.weight_g": "2.parametrizations.weight.original0", "2.weight_v": "2.parametrizations.weight.original1"}
    with torch.no_grad():
        for name, p in old.model.named_parameters():
            p.copy_(new.model.get_parameter(names.get(name, name)))
    left = old.model[2].weight
    learner = MAML(old.model, F.mse_loss, inner_lr=INNER_LR)
    for _ in range(2):
        found = learner.meta_gradient(old.batch).grads
        expected = MAML(new.model, F.mse_loss, inner_lr=INNER_LR).meta_gradient(old.batch).grads
        assert_close(found, {name: expected[names.get(name, name)] for name in found})
        assert old.model[2].weight is left


class Keeps(nn.Module):
    """Keeps what it has computed, in new attributes, old ones, lists and dicts."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 1)
        self.cache: Tensor | None = None
        self.old, self.pair = torch.zeros(2), (torch.zeros(1), "a")
        self.features: list[Tensor] = []
        self.by_name: dict[str, object] = {"a": 1}
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        if self.cache is None:
            self.cache = hidden
        self.seen = self.old = hidden
        self.pair = hidden, "b"
        self.features.append(hidden)
        self.by_name["b"] = hidden
        self.calls += 1
        return self.last(hidden)


def test_what_a_model_keeps_of_a_call_is_taken_back():
    model, loss_fn, batch = problem(Keeps, images(4), 0)
    before = dict(model.__dict__)
    learner = MAML(model, loss_fn, inner_lr=INNER_LR)
    for _ in range(2):
        learner.meta_gradient(batch)
        learner.adapt(batch.support_x, batch.support_y)
        assert model.calls > before["calls"]
        assert all(model.__dict__[name] is value for name, value in before.items() if name != "calls")
        assert model.__dict__.keys() == before.keys()
        assert model.features == []
        assert model.by_name == {"a": 1}
    copy.deepcopy(model)
    model(batch.query_x[0])
    kept = model.cache, model.seen, model.old, *model.pair, *model.features, *model.by_name.values()
    learner.meta_gradient(batch)
    now = model.cache, model.seen, model.old, *model.pair, *model.features, *model.by_name.values()
    assert all(a is b for a, b in zip(kept, now, strict=True))


@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
def test_recurrent_layers_keep_their_weights_in_their_list(name):
    model, loss_fn, batch = REFUSED[name][0]()
    weights = list(model.cell._flat_weights)
    with pytest.raises(ValueError, match="module 'cell'"):
        MAML(model, loss_fn, vectorize="vmap").backward(batch)
    assert all(a is b for a, b in zip(weights, model.cell._flat_weights, strict=True))
    MAML(model, loss_fn, vectorize="loop").backward(batch)
    assert all(a is b for a, b in zip(weights, model.cell._flat_weights, strict=True))


# ---- every layer that PyTorch's own tests know, with one tensor in and one out


def printed_by(script: str, *arguments: str) -> dict[str, Any]:
    """In a process of its own: PyTorch's lists freeze its flags when they are imported."""
    command = [sys.executable, str(SUPPORT / script), *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


@pytest.mark.parametrize("examples", [2, pytest.param(1000, marks=pytest.mark.slow)])
def test_every_layer_of_pytorch_trains_as_in_a_loop(examples):
    found = printed_by("pytorch_layers.py", str(examples))
    assert len(found["done"]) >= 60, found["done"]
    assert found["refused"] == {}


@pytest.mark.slow
def test_every_operation_of_pytorch_does_as_in_a_loop():
    found = printed_by("pytorch_operations.py")
    assert len(found["done"]) >= 450, found["done"]
    assert not found["wrong"]


# ---- libraries of models


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in LARGE_LEARN2LEARN else name for name in LEARN2LEARN]
)
def test_models_of_learn2learn_train_as_in_a_loop(name):
    check(LEARN2LEARN[name](), evaluated=name not in LARGE_LEARN2LEARN)


@pytest.mark.parametrize(
    "name", [name if name in SMALL_TORCHVISION else pytest.param(name, marks=pytest.mark.slow) for name in TORCHVISION]
)
def test_models_of_torchvision_train_as_in_a_loop(name):
    estimator: Estimator = "first-order" if name in FIRST_ORDER_TORCHVISION else "exact"
    check(TORCHVISION[name](), estimator=estimator, inner_lr=SMALL, tolerance=1e-7, evaluated=False)  # they are deep
