"""Exact selection by magnitude, against sorting."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metamom.bias import select
from metamom.bias.select import keep_largest

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LONG = select._SHORT + 1001


def slow_kth(gradient: torch.Tensor, k: int) -> torch.Tensor:
    return gradient.abs().sort(dim=-1, descending=True).values[:, k - 1 : k]


def slow_keep(gradient: torch.Tensor, k: int) -> torch.Tensor:
    order = gradient.abs().sort(dim=-1, descending=True, stable=True).indices[:, :k]
    return torch.zeros_like(gradient).scatter(1, order, gradient.gather(1, order))


def rows(kind: str, n: int, d: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(d)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    if kind == "heavy tails":
        x = x**5
    elif kind == "mostly zero":
        x = x * (torch.rand(n, d, generator=generator) < 0.1)
    elif kind == "all alike":
        x = x.sign()
    elif kind == "falling":  # a regular sample of what is in order
        x = x.abs().sort(dim=-1, descending=True).values
    elif kind == "a sample that misleads":
        x[:, :: d // select._SAMPLE] = 0
    elif kind == "infinite":
        x[:, ::5] = math.inf
    return x.to(dtype)


KINDS = ("normal", "heavy tails", "mostly zero", "all alike", "falling", "a sample that misleads", "infinite")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("d", [1, 7, 1000, LONG])
def test_against_sorting(kind, d, dtype):
    x = rows("normal" if kind.startswith("a sample") and d < LONG else kind, 3, d, dtype)
    before = x.clone()
    for k in sorted({1, min(2, d), (d + 1) // 20 or 1, (d + 1) // 2, max(1, d - 1), d}):
        assert torch.equal(keep_largest(x, k), slow_keep(x, k)), k
        kept = keep_largest(x, k, ties="all")
        assert torch.equal(kept, torch.where(x.abs() >= slow_kth(x, k), x, 0)), k
    assert torch.equal(x, before)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_rows(data):
    n, d = data.draw(st.integers(0, 3)), data.draw(st.integers(1, 40))
    k = data.draw(st.integers(1, d))
    entry = st.floats(width=32, allow_nan=False) | st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45])
    x = torch.tensor(data.draw(st.lists(st.lists(entry, min_size=d, max_size=d), min_size=n, max_size=n))).view(n, d)
    assert torch.equal(keep_largest(x, k), slow_keep(x, k))


@pytest.mark.parametrize("d", [10, LONG])
def test_rows_of_any_layout(d):
    x = rows("normal", 4, 2 * d, torch.float32)[:, ::2]
    assert torch.equal(keep_largest(x, d // 3), slow_keep(x, d // 3))
    x = rows("normal", d, 3, torch.float32).T
    assert torch.equal(keep_largest(x, d // 3), slow_keep(x, d // 3))


def test_one_thread_and_gradients_that_are_tracked():
    threads = torch.get_num_threads()
    x = rows("normal", 3, LONG, torch.float32).requires_grad_()
    torch.set_num_threads(1)
    try:
        kept = keep_largest(x, 100)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(kept, slow_keep(x.detach(), 100))
    assert not kept.requires_grad


@pytest.mark.parametrize("k", [0, -1, 5])
def test_k_out_of_range(k):
    with pytest.raises(ValueError, match=f"1 <= k <= 4; got k={k}"):
        keep_largest(torch.ones(2, 4), k)
