"""Embeddings, and operations that vmap gets wrong: each task's gradient is what a loop gives."""

from __future__ import annotations

import pytest
import torch
from problems import assert_close, regression_batch
from slow_maml import adapt_task, slow_meta_gradient, weights_of
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

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


class WordsByOperator(Words):
    """As a model that `torch.export` has written calls it; padding is the only option."""

    def forward(self, x: Tensor) -> Tensor:
        found = torch.ops.aten.embedding.default(self.words.weight, x, self.words.padding_idx)
        return self.head(torch.tanh(found).mean(1))


class WordsLater(nn.Module):
    """Begins to call what is replaced after the first time."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Parameter(torch.randn(5, 3)), nn.Linear(3, 1)
        self.masked = False

    def forward(self, x: Tensor) -> Tensor:
        found = F.embedding(x, self.words, padding_idx=0) if self.masked else self.words[x]
        return self.head(torch.tanh(found).mean(1))


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


def test_operators_of_exported_models_are_replaced_too():
    model, batch = problem(WordsByOperator, {"padding_idx": 0})
    expected, _ = slow_meta_gradient(model, F.mse_loss, batch, inner_lr=0.3)
    by_name = torch.embedding  # which F.embedding ends in
    for call in (torch.ops.aten.embedding.default, torch.ops.aten.embedding, by_name):
        model.forward = lambda x, call=call: model.head(torch.tanh(call(model.words.weight, x, 0)).mean(1))
        grads = MAML(model, F.mse_loss, inner_lr=0.3).meta_gradient(batch).grads
        assert_close({name: g.mean(0) for name, g in grads.items()}, expected)


def test_an_exported_model_trains():
    model, batch = problem(Words, {"padding_idx": 0})
    points = {0: torch.export.Dim("points")}
    exported = torch.export.export(model, (batch.support_x[0],), dynamic_shapes={"x": points}).module()
    grads = MAML(exported, F.mse_loss, inner_lr=0.3).meta_gradient(batch).grads
    expected, _ = slow_meta_gradient(model, F.mse_loss, batch, inner_lr=0.3)
    assert_close({name: grads[name].mean(0) for name in expected}, expected)


def test_a_model_may_call_it_later():
    model, batch = problem(WordsLater, {})
    learner = MAML(model, F.mse_loss, inner_lr=0.3)
    for model.masked in (False, True):
        grads = learner.meta_gradient(batch).grads
        expected, _ = slow_meta_gradient(model, F.mse_loss, batch, inner_lr=0.3)
        assert_close({name: g.mean(0) for name, g in grads.items()}, expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated")
@pytest.mark.parametrize("write", ["script", "trace"])
def test_scripted_code_that_calls_it_is_refused(write):
    model, batch = problem(Words, {"padding_idx": 0})
    words = model.words
    model.words = torch.jit.script(words) if write == "script" else torch.jit.trace(words, batch.support_x[0])
    with pytest.raises(
        ValueError, match=r"scripted code in the model calls embedding.*Pass the original model, before torch.jit"
    ):
        MAML(model, F.mse_loss)


@pytest.mark.parametrize("kind", [Words, WordsByFunction])
def test_a_compiled_learner_agrees(kind, traced):
    model, batch = problem(kind, {"padding_idx": 0})
    compiled = MAML(model, F.mse_loss, inner_lr=0.3, compile=True).meta_gradient(batch).grads
    expected, _ = slow_meta_gradient(model, F.mse_loss, batch, inner_lr=0.3)
    assert_close({name: g.mean(0) for name, g in compiled.items()}, expected)
    assert len(traced) == 1


# ---- operations that vmap does wrong in silence

SAME = torch.ones(2, 2, dtype=torch.float64)


OPERATIONS = {
    "select_scatter, first": lambda x, w: torch.select_scatter(x, w[0] * x[:, 0], 1, 0),
    "select_scatter, last": lambda x, w: (w[:1] * x).select_scatter(w[0] * x[0], 0, -1),
    "index_fill, same for all": lambda x, w: SAME.index_fill(1, torch.tensor([1]), w[0, 0]) @ w * x,
    "index_fill": lambda x, w: torch.index_fill(x @ w, 1, torch.tensor([0]), w.sum()),
    "index_fill, a number": lambda x, w: (x @ w).index_fill(0, torch.tensor([1]), 0.5),
    "prelu, same for all": lambda x, w: F.prelu(SAME - 0.3, w[0, :1]) @ w * x,
    "prelu, channels": lambda x, w: F.prelu(x @ w, w[0]) + nn.functional.prelu(SAME[0], w[1, 1]),
    "roll of a number": lambda x, w: x * torch.roll(w[0, 1], 1) + w.sum().roll(3),
    "roll": lambda x, w: torch.roll(x @ w, 1) + (x @ w).roll((1, -1), (0, 1)),
}


def halved_backwards(x: Tensor, w: Tensor) -> Tensor:
    h = torch.tanh(x @ w)
    return h * 0.5 + 0.5 * h.detach() if h.requires_grad and not x.requires_grad else h * 3


def doubled_unless_a_leaf(x: Tensor, w: Tensor) -> Tensor:
    h = x @ w
    return torch.tanh(h if h.is_leaf else 2 * h) * (1 if x.is_leaf else 3)


def retained(x: Tensor, w: Tensor) -> Tensor:
    h = torch.tanh(x @ w)
    h.retain_grad()
    return h


OPERATIONS |= {"requires_grad": halved_backwards, "is_leaf": doubled_unless_a_leaf, "retain_grad": retained}


def test_a_hook_in_the_forward_is_refused_under_vmap():
    def hooked(x: Tensor, w: Tensor) -> Tensor:
        h = torch.tanh(x @ w)
        h.register_hook(lambda gradient: gradient / 2)
        return h

    learner = MAML(Operation(hooked).double(), F.mse_loss, vectorize="vmap")
    with pytest.raises(ValueError, match=r"registers a hook on a tensor, .*use a torch\.autograd\.Function"):
        learner.backward(regression_batch(tasks=3, support=2, query=2))


class Operation(nn.Module):
    def __init__(self, operation) -> None:
        super().__init__()
        self.weight, self.operation = nn.Parameter(torch.randn(2, 2)), operation

    def forward(self, x: Tensor) -> Tensor:
        return self.operation(x, self.weight)[:, :1].tanh()


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_does_as_in_a_loop(name):
    torch.manual_seed(0)
    model, batch = Operation(OPERATIONS[name]).double(), regression_batch(tasks=3, support=2, query=2)
    learner = MAML(model, F.mse_loss, inner_lr=0.3)
    expected, losses = slow_meta_gradient(model, F.mse_loss, batch, inner_lr=0.3)
    for _ in range(2):
        grads, ours = learner.meta_gradient(batch)
        assert_close({name: g.mean(0) for name, g in grads.items()}, expected)
        torch.testing.assert_close(ours, losses)


@pytest.mark.parametrize("index", [2, -3])
def test_a_place_that_is_not_there_is_an_error(index):
    model = Operation(lambda x, w: torch.select_scatter(x, w[0], 0, index)).double()
    with pytest.raises((IndexError, ValueError), match="out of range"):
        MAML(model, F.mse_loss).meta_gradient(regression_batch(tasks=3, support=2, query=2))


def test_the_flops_of_a_meta_gradient_can_be_counted():
    """By PyTorch's counter, which hangs hooks on what requires a gradient."""
    torch.manual_seed(0)
    model, batch = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double(), regression_batch(tasks=3)
    learner = MAML(model, F.mse_loss)
    with FlopCounterMode(display=False) as counter:
        learner.backward(batch)
    assert counter.get_total_flops() > 0
