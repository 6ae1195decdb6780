"""Embeddings and attention: each task's gradient is the one that it has by itself, in a loop."""

from __future__ import annotations

import pytest
import torch
from problems import assert_close, regression_batch
from slow_maml import adapt_task, slow_meta_gradient, weights_of
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from metamom import MAML, TaskBatch
from metamom.functions_by_task import attention

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


# ---- attention


class Attending(nn.Module):
    def __init__(self, **options: object) -> None:
        super().__init__()
        self.keys, self.values, self.head = nn.Linear(2, 4), nn.Linear(2, 4), nn.Linear(4, 1)
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        keys, values = (layer(x).unsqueeze(0).expand(2, -1, -1) for layer in (self.keys, self.values))
        return self.head(F.scaled_dot_product_attention(keys, keys, values, **self.options)[0])


def plain_attention(query, key, value, mask, scale):
    """Position by position, as the formula has it."""
    out = []
    for i in range(query.shape[0]):
        scores = torch.stack([(query[i] * k).sum() * scale for k in key]) + mask[i]
        weights = scores.exp() / scores.exp().sum()
        out.append(sum(w * v for w, v in zip(weights, value, strict=True)))
    return torch.stack(out)


MASKS = {
    "none": ({}, torch.zeros(5, 5)),
    "scale": ({"scale": 0.3}, torch.zeros(5, 5)),
    "causal": ({"is_causal": True}, torch.zeros(5, 5).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)),
    "boolean": (
        {"attn_mask": torch.eye(5).flip(0).bool() | torch.eye(5).bool()},
        torch.full((5, 5), -torch.inf).masked_fill((torch.eye(5) + torch.eye(5).flip(0)).bool(), 0),
    ),
    "added": ({"attn_mask": torch.arange(25.0).view(5, 5).double() / 8}, torch.arange(25.0).view(5, 5) / 8),
}


@pytest.mark.parametrize("estimator", ["exact", "first-order"])
@pytest.mark.parametrize("mask", MASKS)
def test_attention_agrees_with_its_formula(mask, estimator):
    options, added = MASKS[mask]
    torch.manual_seed(0)
    model = Attending(**options).double()

    class Plain(Attending):
        def forward(self, x: Tensor) -> Tensor:
            keys, values = self.keys(x), self.values(x)
            return self.head(plain_attention(keys, keys, values, added.double(), options.get("scale", 0.5)))

    plain = Plain().double()
    plain.load_state_dict(model.state_dict())
    batch = regression_batch(tasks=3, support=5, query=5)
    learner = MAML(model, F.mse_loss, inner_lr=0.1, estimator=estimator)
    expected, losses = slow_meta_gradient(
        plain, F.mse_loss, batch, inner_lr=0.1, first_order=estimator == "first-order"
    )
    for _ in range(2):
        assert_close({name: g.mean(0) for name, g in learner.meta_gradient(batch).grads.items()}, expected)
    torch.testing.assert_close(learner.losses(batch).detach(), losses)
    with torch.no_grad():
        torch.testing.assert_close(learner.losses(batch), losses)


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_a_transformer_layer_trains(training, compile, traced):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True).train(training)
    model = nn.Sequential(nn.Unflatten(1, (3, 4)), layer, nn.Flatten(), nn.Linear(12, 1)).double()
    batch = regression_batch(tasks=3, dim=12)
    with sdpa_kernel(SDPBackend.MATH):
        expected, _ = slow_meta_gradient(model, F.mse_loss, batch, inner_lr=0.1)
    learner = MAML(model, F.mse_loss, inner_lr=0.1, compile=compile)
    for _ in range(2):
        assert_close({name: g.mean(0) for name, g in learner.meta_gradient(batch).grads.items()}, expected)
    with torch.no_grad():
        params = learner.adapt(batch.support_x, batch.support_y)
        found = learner.predict(params, batch.query_x)
        for t in range(3):
            one = torch.func.functional_call(model, {name: w[t] for name, w in params.items()}, (batch.query_x[t],))
            torch.testing.assert_close(found[t], one)


def test_grouped_queries_share_their_keys():
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(n, 5, 4, generator=generator) for n in (4, 2, 2))
    found = attention(query, key, value, enable_gqa=True)
    for head in range(4):
        expected = F.scaled_dot_product_attention(query[head], key[head // 2], value[head // 2])
        torch.testing.assert_close(found[head], expected)
