"""A graph must not keep values of the batch that it is made from: code that reads them is not compiled."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from problems import generator, relative_error
from torch import Tensor, nn
from torch.nn import functional as F

from metamom import MAML, TaskBatch
from metamom.compile.values import ValuesReadError

READERS: dict[str, Callable[[Tensor], object]] = {
    "tolist": lambda h: sum(h[0].tolist()),
    "numpy": lambda h: float(h.detach().numpy()[0, 0]),
    "asarray": lambda h: float(np.asarray(h.detach())[0, 0]),
    "item": lambda h: h[0, 0].item(),
    "if": lambda h: 2.0 if h.sum() > 0 else 1.0,
    "mask": lambda h: h[h > 0].mean(),
    "masked_select": lambda h: h.masked_select(h > 0).sum(),
    "nonzero": lambda h: len((h > 0).nonzero()),
    "unique": lambda h: len(torch.unique(h.detach().sign())),
}


class Reading(nn.Module):
    def __init__(self, read: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.read = read
        self.first, self.head = nn.Linear(3, 6), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        out: Tensor = self.head(hidden * (1 + self.read(hidden)))
        return out


def batch(seed: int) -> TaskBatch:
    draw = generator(seed)
    return TaskBatch(*(torch.randn(4, 5, d, generator=draw, dtype=torch.float64) for d in (3, 1, 3, 1)))


def made(read: Callable[[Tensor], object]) -> nn.Module:
    torch.manual_seed(0)
    return Reading(read).double()


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
@pytest.mark.filterwarnings("ignore:.*cannot run on all tasks at once")
def test_a_model_that_reads_values_is_refused(read, traced):
    learner = MAML(made(read), F.mse_loss, compile=True)
    with pytest.raises(ValuesReadError, match=r"reads values \(.*line \d+\), .*run without compiling"):
        learner.backward(batch(0))
    assert not traced


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_or_is_not_compiled_on_its_own(read, traced):
    model = made(read)
    learner, eager = MAML(model, F.mse_loss, compile="auto"), MAML(copy.deepcopy(model), F.mse_loss)
    learner.expect(10**9)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for seed in range(6):
            found, wanted = (one.meta_gradient(batch(seed)).grads for one in (learner, eager))
            assert relative_error(found, wanted) < 1e-12
    assert sum("continues without compiling" in str(each.message) for each in said) == 1
    assert not traced


@pytest.mark.filterwarnings("ignore:.*cannot run on all tasks at once")
def test_a_loss_that_reads_values_is_refused(traced):
    def loss(predicted: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(predicted, y) * float(y.numpy().max())

    with pytest.raises(ValuesReadError, match=r"Tensor.numpy in loss, test_values_that_are_read.py"):
        MAML(nn.Linear(3, 1).double(), loss, compile=True).backward(batch(0))


class Constants(nn.Module):
    """Reads what does not depend on the batch, and prints what does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.register_buffer("chosen", torch.tensor([True, False, True]))

    def forward(self, x: Tensor) -> Tensor:
        scale = sum(self.chosen.tolist())
        print(x)
        out: Tensor = self.layer(x[:, self.chosen]) * scale
        return out


def test_constants_may_be_read_and_tensors_printed(traced):
    model = Constants().double()
    learner, eager = MAML(model, F.mse_loss, compile=True), MAML(copy.deepcopy(model), F.mse_loss)
    for seed in range(3):
        found, wanted = (one.meta_gradient(batch(seed)).grads for one in (learner, eager))
        assert relative_error(found, wanted) < 1e-12
    assert len(traced) == 1
