"""Embeddings: each task's gradient is the one that it has by itself, whichever tasks are computed with it."""

from __future__ import annotations

import pytest
import torch
from problems import assert_close
from slow_maml import adapt_task, slow_meta_gradient, weights_of
from torch import Tensor, nn
from torch.nn import functional as F

from metamom import MAML, TaskBatch

OPTIONS = {
    "plain": {},
    "padding": {"padding_idx": 0},
    "padding at the end": {"padding_idx": -1},
    "scaled by frequency": {"scale_grad_by_freq": True},
    "both": {"padding_idx": 2, "scale_grad_by_freq": True},
}


class Words(nn.Module):
    def __init__(self, **options: object) -> None:
        super().__init__()
        self.words = nn.Embedding(5, 3, **options)
        self.head = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.words(x)).mean(1))


class WordsByFunction(nn.Module):
    """The indices are made inside, so that nothing but the call itself tells that it looks something up."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.options = options
        self.words = nn.Parameter(torch.randn(5, 3))
        self.head = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(F.embedding(x.long(), self.words, **self.options)).mean(1))


def batch_of(dtype: torch.dtype = torch.int64) -> TaskBatch:
    generator = torch.Generator().manual_seed(0)

    def points(n: int) -> tuple[Tensor, Tensor]:
        x = torch.randint(0, 5, (4, n, 6), generator=generator)
        return x.to(dtype), torch.randn(4, n, 1, generator=generator, dtype=torch.float64)

    return TaskBatch(*points(3), *points(2))


def problem(kind: type[nn.Module], options: dict[str, object]) -> tuple[nn.Module, TaskBatch]:
    torch.manual_seed(0)
    batch = batch_of(torch.float64 if kind is WordsByFunction else torch.int64)
    return kind(**options).double(), batch


@pytest.mark.parametrize("adapt", [None, ["head"]], ids=["all adapt", "shared table"])
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", [Words, WordsByFunction])
def test_meta_gradient_is_that_of_a_loop(kind, options, steps, adapt):
    model, batch = problem(kind, options)
    learner = MAML(model, F.mse_loss, inner_lr=0.3, inner_steps=steps, adapt=adapt)
    for _ in range(2):  # the second call knows what the first has found out
        grads = learner.meta_gradient(batch).grads
        expected, _ = slow_meta_gradient(
            model, F.mse_loss, batch, steps=steps, inner_lr=0.3, adapted=set(learner.adapted)
        )
        assert_close({name: g.mean(0) for name, g in grads.items()}, expected)


@pytest.mark.parametrize("kind", [Words, WordsByFunction])
def test_no_task_adapts_its_padding(kind):
    model, batch = problem(kind, {"padding_idx": 0})
    adapted = MAML(model, F.mse_loss, inner_lr=0.3).adapt(batch.support_x, batch.support_y)
    table = adapted[next(name for name in adapted if name.startswith("words"))]
    start = dict(model.named_parameters())[next(name for name in adapted if name.startswith("words"))]
    assert (batch.support_x == 0).any((1, 2)).all()
    assert torch.equal(table[:, 0], start[0].expand(4, -1))
    for task in range(4):
        expected = adapt_task(
            model, F.mse_loss, weights_of(model), batch.support_x[task], batch.support_y[task], steps=1,
            inner_lr=lambda name: 0.3, adapted=set(adapted),
        )  # fmt: skip
        assert_close({n: w[task].detach() for n, w in adapted.items()}, {n: w.detach() for n, w in expected.items()})


def test_sparse_gradients_are_as_dense_ones():
    model, batch = problem(Words, {"sparse": True})
    dense, _ = problem(Words, {})
    grads = MAML(model, F.mse_loss, inner_lr=0.3).meta_gradient(batch).grads
    expected = MAML(dense, F.mse_loss, inner_lr=0.3).meta_gradient(batch).grads
    assert_close(grads, expected)


@pytest.mark.parametrize("kind", [Words, WordsByFunction])
def test_a_compiled_learner_agrees(kind, traced):
    model, batch = problem(kind, {"padding_idx": 0})
    compiled = MAML(model, F.mse_loss, inner_lr=0.3, compile=True).meta_gradient(batch).grads
    expected, _ = slow_meta_gradient(model, F.mse_loss, batch, inner_lr=0.3)
    assert_close({name: g.mean(0) for name, g in compiled.items()}, expected)
    assert len(traced) == 1
