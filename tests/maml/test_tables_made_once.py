"""Models that make a table at their first call and note in an attribute that they have it, as position encodings do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from problems import assert_close
from slow_maml import meta_gradient_by_copies
from torch import Tensor, nn
from torch.nn import functional as F

from metamom import MAML, TaskBatch

ALPHA = 0.1


class Rotary(nn.Module):
    """A linear layer of inputs with their positions; ``table`` makes or finds a tensor ``[N, 1]`` of them."""

    def __init__(self, table: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.table_of = nn.Linear(1, 1), table

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.sin(x + self.table_of(self, x)))


def positions(x: Tensor) -> Tensor:
    return x.new_ones(len(x), 1).cumsum(0) / 10


def by_length(self: nn.Module, x: Tensor) -> Tensor:
    if len(x) > getattr(self, "length", 0):
        self.length = len(x)
        self.table = torch.arange(1, len(x) + 1, dtype=x.dtype)[:, None] / 10
    return self.table[: len(x)]


def of_the_inputs(self: nn.Module, x: Tensor) -> Tensor:
    if getattr(self, "length", None) != len(x):
        self.length, self.table = len(x), positions(x)
    return self.table


def by_flag(self: nn.Module, x: Tensor) -> Tensor:
    if not getattr(self, "ready", False):
        self.ready, self.table = True, positions(x)
    return self.table


def by_key(self: nn.Module, x: Tensor) -> Tensor:
    key = (len(x), x.dtype, x.device)
    if getattr(self, "key", None) != key:
        self.key, self.tables = key, {"positions": positions(x)}
    return self.tables["positions"]


def in_a_list(self: nn.Module, x: Tensor) -> Tensor:
    if not hasattr(self, "tables"):
        self.tables, self.length = [], 0
    if self.length != len(x):
        self.length = len(x)
        self.tables.append(positions(x))
    return self.tables[-1]


def in_a_buffer(self: nn.Module, x: Tensor) -> Tensor:
    if getattr(self, "length", None) != len(x):
        self.length = len(x)
        self.register_buffer("table", positions(x), persistent=False)
    return self.table


@pytest.mark.parametrize("vectorize", ["auto", "vmap", "loop"])
@pytest.mark.parametrize("table", [by_length, of_the_inputs, by_flag, by_key, in_a_list])
def test_tables_are_made_again(table, vectorize):
    torch.manual_seed(0)
    model = Rotary(table).double()
    batch = TaskBatch(*torch.randn(4, 3, 5, 1, dtype=torch.float64))
    twin = Rotary(table).double()
    twin.load_state_dict(model.state_dict())
    wanted = meta_gradient_by_copies(twin, F.mse_loss, batch, inner_lr=ALPHA)
    before = dict(vars(model))
    learner = MAML(model, F.mse_loss, inner_lr=ALPHA, vectorize=vectorize)
    for _ in range(3):
        found = {name: g.squeeze(0) for name, g in learner.meta_gradient(batch).grads.items()}
        assert_close(found, wanted)
    assert vars(model) == before
    torch.testing.assert_close(model(batch.query_x[0]), twin(batch.query_x[0]))
    assert_close({name: g.squeeze(0) for name, g in learner.meta_gradient(batch).grads.items()}, wanted)


@pytest.mark.parametrize("vectorize", ["auto", "vmap", "loop"])
def test_buffers_with_tensors_of_vmap_are_not_kept(vectorize):
    torch.manual_seed(0)
    model = Rotary(in_a_buffer).double()
    twin = Rotary(in_a_buffer).double()
    twin.load_state_dict(model.state_dict())
    batch = TaskBatch(*torch.randn(4, 3, 5, 1, dtype=torch.float64))
    wanted = meta_gradient_by_copies(twin, F.mse_loss, batch, inner_lr=ALPHA)
    learner = MAML(model, F.mse_loss, inner_lr=ALPHA, vectorize=vectorize)
    for _ in range(3):
        assert_close({name: g.squeeze(0) for name, g in learner.meta_gradient(batch).grads.items()}, wanted)
    torch.testing.assert_close(model(batch.query_x[0]), twin(batch.query_x[0]))
    assert_close({name: g.squeeze(0) for name, g in learner.meta_gradient(batch).grads.items()}, wanted)


def test_a_buffer_that_grows():
    """Its length is in an attribute, which is set back with the buffer."""

    def table(self: nn.Module, x: Tensor) -> Tensor:
        if len(x) > self.length:
            self.length = len(x)
            self.grown = torch.arange(1, len(x) + 1, dtype=x.dtype)[:, None] / 10
        return self.grown[: len(x)]

    torch.manual_seed(0)
    model = Rotary(table).double()
    model.register_buffer("grown", torch.zeros(0, 1, dtype=torch.float64))
    model.length = 0
    batch = TaskBatch(*torch.randn(4, 3, 5, 1, dtype=torch.float64))
    twin = Rotary(by_length).double()
    twin.linear = model.linear
    wanted = meta_gradient_by_copies(twin, F.mse_loss, batch, inner_lr=ALPHA)
    learner = MAML(model, F.mse_loss, inner_lr=ALPHA)
    for _ in range(3):
        assert_close({name: g.squeeze(0) for name, g in learner.meta_gradient(batch).grads.items()}, wanted)
    assert (model.length, len(model.grown)) == (0, 0)
    torch.testing.assert_close(model(batch.query_x[0]), twin(batch.query_x[0]))


class Annealed(Rotary):
    """Counts its calls, cools down, and keeps what it has computed last."""

    def __init__(self) -> None:
        super().__init__(by_flag)
        self.calls, self.temperature = 0, 1.0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.temperature *= 0.5
        self.last = super().forward(x)
        return self.last


def test_counters_go_on():
    model, batch = Annealed(), TaskBatch(*torch.randn(4, 3, 5, 1))
    learner = MAML(model, F.mse_loss, inner_lr=ALPHA)
    learner.meta_gradient(batch)
    calls = model.calls
    assert calls >= 2
    assert model.temperature == 0.5**calls
    learner.meta_gradient(batch)
    assert model.calls >= calls + 2
    assert not hasattr(model, "last")
    assert not hasattr(model, "ready")
