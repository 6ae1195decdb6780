"""Top-K: which entries stay, how many, and by how much it contracts."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operators import G, assert_identical, each_dtype, gradients

from metamom import RandK, TopK


@settings(deadline=None, max_examples=50)
@given(g=gradients(min_d=1), data=st.data())
def test_top_k_keeps_the_k_largest_the_first_of_equals(g, data):
    d = g.shape[-1]
    k = data.draw(st.integers(1, d))
    for row, out in zip(g.reshape(-1, d), TopK(k)(g).reshape(-1, d), strict=True):
        order = sorted(range(d), key=lambda i, row=row: (-abs(row[i].item()), i))
        expected = torch.zeros_like(row)
        expected[order[:k]] = row[order[:k]]
        assert_identical(out, expected)


@settings(deadline=None, max_examples=50)
@given(g=gradients(min_d=1), data=st.data())
def test_ties_can_all_be_kept(g, data):
    d = g.shape[-1]
    k = data.draw(st.integers(1, d))
    for row, out in zip(g.reshape(-1, d), TopK(k, ties="all")(g).reshape(-1, d), strict=True):
        threshold = sorted(row.abs().tolist())[d - k]
        assert out.tolist() == [x if abs(x) >= threshold else 0 for x in row.tolist()]


@settings(deadline=None, max_examples=50)
@given(g=gradients(min_d=1), data=st.data())
def test_top_k_contracts(g, data):
    """||C(g) - g||^2 <= (1 - K/d) ||g||^2, in float64 for numbers that are exact in it."""
    operator = TopK(data.draw(st.integers(1, g.shape[-1])))
    exact = g.double()
    error = (operator(g).double() - exact).square().sum(-1)
    bound = (1 - operator.contraction(g.shape[-1])) * exact.square().sum(-1)
    assert bool((error <= bound * (1 + 1e-12)).all())


@pytest.mark.parametrize("k", range(1, 6))
def test_equal_entries_meet_the_bound(k):
    g = torch.tensor([2.0, -2.0, 2.0, 2.0, -2.0])
    error = (TopK(k)(g) - g).square().sum()
    assert float(error) == pytest.approx((1 - TopK(k).contraction(5)) * 20)


@each_dtype
def test_top_k_keeps_exactly_k_of_equals(dtype):
    ties = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0], dtype=dtype)
    assert TopK(2)(ties).tolist() == [1, -1, 0, 0, 0]
    assert torch.equal(TopK(2, ties="all")(ties), ties)
    mixed = torch.tensor([2.0, 1.0, -3.0, 1.0, 1.0], dtype=dtype)
    assert TopK(3)(mixed).tolist() == [2, 1, -3, 0, 0]
    assert TopK(3, ties="all")(mixed).tolist() == [2, 1, -3, 1, 1]


def test_as_many_entries_as_there_are():
    for operator in (TopK(4), RandK(4), TopK(ratio=1.0), RandK(ratio=1.0), RandK(4, scaled=True)):
        out = operator(G)
        assert torch.equal(out, G)
        assert out is not G


@pytest.mark.parametrize("make", [TopK, RandK])
@pytest.mark.parametrize(
    ("ratio", "d", "k"), [(0.05, 669706, 33485), (0.001, 10, 1), (0.25, 10, 2), (0.35, 10, 4), (1.0, 7, 7), (0.5, 3, 2)]
)
def test_ratio_means_the_rounded_share(make, ratio, d, k):
    assert make(ratio=ratio).kept(d) == k
    assert int((make(ratio=ratio)(torch.arange(1.0, d + 1)) != 0).sum()) == k


@pytest.mark.parametrize("make", [TopK, RandK])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either k= or ratio=; got k=None, ratio=None"),
        ({"k": 3, "ratio": 0.1}, "either k= or ratio=; got k=3, ratio=0.1"),
        ({"k": 0}, "k >= 1; got k=0"),
        ({"k": 0.05}, "got k=0.05. Pass ratio= to keep a share"),
        ({"k": True}, "got k=True"),
        ({"ratio": 0.0}, "0 < ratio <= 1; got ratio=0.0"),
        ({"ratio": 5}, "got ratio=5. 5 % is ratio=0.05"),
        ({"ratio": math.nan}, "got ratio=nan"),
    ],
)
def test_bad_amounts(make, arguments, message):
    with pytest.raises(ValueError, match=f"{make.__name__} needs .*{re.escape(message)}"):
        make(**arguments)


def test_bad_ties():
    with pytest.raises(ValueError, match='by "index" or keeps "all"; got ties=\'first\''):
        TopK(1, ties="first")


@pytest.mark.parametrize("make", [TopK, RandK])
def test_more_entries_than_there_are(make):
    message = rf"{make.__name__} needs 1 <= k <= 4 \(the number of parameters\); got k=5\. Pass ratio="
    for call in (make(5), make(5).wire_bytes, make(5).contraction, make(5).encode):
        with pytest.raises(ValueError, match=message):
            call(G if call in (make(5),) or getattr(call, "__name__", "") == "encode" else 4)


@pytest.mark.parametrize("make", [TopK, RandK])
def test_more_entries_than_a_tensor_has(make):
    operator, g, sizes = make(1000, per_tensor=True), torch.ones(2522), [2000, 512, 0, 10]
    message = (
        f"{make.__name__} needs 1 <= k <= 10 (the number of entries of the smallest parameter tensor; {operator.spec} "
        "acts on each); got k=1000. Pass ratio= to keep a share of each."
    )
    calls = (
        lambda: operator(g, sizes=sizes),
        lambda: operator.encode(g, sizes=sizes),
        lambda: operator.wire_bytes(2522, sizes=sizes),
        lambda: operator.constants(2522, sizes=sizes),
        lambda: operator.contraction(2522, sizes),
    )
    for call in calls:
        with pytest.raises(ValueError, match=re.escape(message)):
            call()
