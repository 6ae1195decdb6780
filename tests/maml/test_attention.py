"""Attention with per-task weights agrees with its formula."""

from __future__ import annotations

import pytest
import torch
from problems import assert_close, regression_batch
from slow_maml import slow_meta_gradient
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from metamom import MAML, TaskBatch
from metamom.maml.under_vmap.attention_by_task import attention


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


class Padded(nn.Module):
    """Attention in sequences with padding, the first of which is nothing else."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.keys, self.head = how, nn.Linear(4, 4), nn.Linear(4, 1)
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        keys, padding = self.keys(x), torch.cat([torch.ones_like(x[:1, :, 0]), x[1:, :, 0]]) > 0
        if self.how == "module":
            out, _ = self.attend(keys, keys, keys, key_padding_mask=padding, need_weights=False)
        else:
            mask = ~padding.unsqueeze(1)
            if self.how == "added":
                mask = torch.zeros_like(mask, dtype=x.dtype).masked_fill(~mask, -torch.inf)
            out = F.scaled_dot_product_attention(keys, keys, keys, attn_mask=mask)
        return self.head(out.mean(1))


@pytest.mark.parametrize("how", ["module", "boolean", "added"])
def test_who_may_look_at_nothing_sees_zeros(how):
    torch.manual_seed(0)
    model = Padded(how).double()
    xs = [torch.randn(3, n, 3, 4, dtype=torch.float64) for n in (4, 3)]
    batch = TaskBatch(xs[0], xs[0][:, :, 0, :1], xs[1], xs[1][:, :, 0, :1])
    with sdpa_kernel(SDPBackend.MATH):
        expected, _ = slow_meta_gradient(model, F.mse_loss, batch, inner_lr=0.3)
    grads = MAML(model, F.mse_loss, inner_lr=0.3).meta_gradient(batch).grads
    assert_close({name: g.mean(0) for name, g in grads.items()}, expected)


def test_grouped_queries_share_their_keys():
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(n, 5, 4, generator=generator) for n in (4, 2, 2))
    found = attention(query, key, value, enable_gqa=True)
    for head in range(4):
        expected = F.scaled_dot_product_attention(query[head], key[head // 2], value[head // 2])
        torch.testing.assert_close(found[head], expected)
