"""One suite for every bias operator, and what each of them promises besides; then the aggregation they feed."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from metamom import Clip, Identity, TopK
from metamom.aggregate import aggregate, flatten, unflatten
from metamom.bias import BiasOperator, parse

OPERATORS = [Identity(), TopK(1), TopK(3), TopK(ratio=0.3), TopK(ratio=1.0), Clip(0.5), Clip(1e-3), Clip(30.0)]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
G = torch.tensor([3.0, -1.0, 2.0, 0.5], dtype=torch.float64)

each_operator = pytest.mark.parametrize("operator", OPERATORS, ids=repr)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@st.composite
def gradients(draw: st.DrawFn, min_d: int = 3) -> Tensor:
    """``[d]`` or ``[n, d]`` of any dtype, with ties and zeros among the entries, and vectors of zeros."""
    n, d = draw(st.integers(1, 4)), draw(st.integers(min_d, 24))
    entries = st.one_of(st.integers(-3, 3).map(float), st.floats(-100, 100, width=16))
    rows = draw(st.lists(st.lists(entries, min_size=d, max_size=d), min_size=n, max_size=n))
    g = torch.tensor(rows, dtype=torch.float64).to(draw(st.sampled_from(DTYPES)))
    return g[0] if n == 1 and draw(st.booleans()) else g


def rounding(dtype: torch.dtype, d: int) -> float:
    """Relative error of a norm over d entries, and of one product more."""
    return (4 + math.sqrt(d)) * torch.finfo(dtype).eps


@each_operator
@settings(deadline=None, max_examples=60)
@given(g=gradients())
def test_every_operator(operator, g):
    before = g.clone()
    out = operator(g)
    assert out.shape == g.shape
    assert out.dtype == g.dtype
    assert torch.equal(g, before)
    assert torch.equal(out, operator(g))  # deterministic
    if g.dim() == 2:
        rows = torch.stack([operator(row) for row in g])
        # norms may be summed in another order in a batch
        torch.testing.assert_close(out, rows, rtol=rounding(g.dtype, g.shape[-1]), atol=0)
    # no operator here turns an entry round or makes it larger, nor the gradient as a whole
    assert bool((out * g >= 0).all())
    assert bool((out.abs() <= g.abs() * (1 + rounding(g.dtype, g.shape[-1]))).all())


@each_operator
@each_dtype
def test_zero_stays_zero(operator, dtype):
    assert torch.equal(operator(torch.zeros(2, 5, dtype=dtype)), torch.zeros(2, 5, dtype=dtype))


@each_operator
def test_three_dimensions_and_strides(operator):
    g = torch.randn(3, 6, 2, generator=torch.Generator().manual_seed(0)).transpose(1, 2)
    expected = torch.stack([operator(part.contiguous()) for part in g])
    torch.testing.assert_close(operator(g), expected)


@each_operator
@each_dtype
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_visible(operator, dtype, bad):
    """A check for finite values behind the operator must see what came in front of it."""
    g = torch.tensor([[1.0, -2.0, 3.0, 0.0, 0.0], [1.0, -2.0, bad, 0.0, 4.0]], dtype=dtype)
    out = operator(g)
    assert bool(out[0].isfinite().all())
    assert not bool(out[1].isfinite().all())


@each_operator
def test_spec_names_the_operator(operator):
    assert parse(operator.spec) == operator
    assert parse(f" {operator.spec} ") == operator


@each_operator
def test_operators_are_values(operator):
    again = eval(repr(operator), {"TopK": TopK, "Clip": Clip, "Identity": Identity})
    assert again == operator
    assert hash(again) == hash(operator)
    assert [other == operator for other in OPERATORS].count(True) == 1
    assert len({*OPERATORS, again}) == len(OPERATORS)
    assert operator != operator.spec


@settings(deadline=None)
@given(ratio=st.floats(1e-12, 1.0, exclude_min=True), tau=st.floats(1e-300, 1e300))
def test_specs_lose_no_digit(ratio, tau):
    assert parse(TopK(ratio=ratio).spec) == TopK(ratio=ratio)
    assert parse(Clip(tau).spec) == Clip(tau)


@pytest.mark.parametrize(
    ("spec", "operator"),
    [
        ("none", Identity()),
        ("topk:33500", TopK(33500)),
        ("topk:5%", TopK(ratio=0.05)),
        ("topk:0.1%", TopK(ratio=0.001)),
        ("topk:7%", TopK(ratio=0.07)),
        ("topk:100%", TopK(ratio=1.0)),
        ("clip:1.0", Clip(1)),
        ("clip:1e-3", Clip(0.001)),
    ],
)
def test_parse(spec, operator):
    assert parse(spec) == operator


@pytest.mark.parametrize(
    ("operator", "spec"),
    [(TopK(ratio=0.07), "topk:7%"), (TopK(ratio=0.5), "topk:50%"), (Clip(2), "clip:2"), (Clip(0.5), "clip:0.5")],
)
def test_specs_are_short(operator, spec):
    assert operator.spec == spec


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "unknown bias operator ''; wanted none, topk:K, topk:P% or clip:TAU"),
        ("sign", "unknown bias operator 'sign'"),
        ("none:1", "unknown bias operator 'none:1'"),
        ("TopK:3", "unknown bias operator"),
        ("topk", "bias operator 'topk': '' does not fit topk"),
        ("topk:", "'' does not fit topk"),
        ("topk:1.5", "'1.5' does not fit topk"),
        ("topk:0", "does not fit topk: TopK needs a whole number k >= 1; got k=0"),
        ("topk:-3", "whole number k >= 1; got k=-3"),
        ("topk:%", "'%' does not fit topk"),
        ("topk:0%", "0 < ratio <= 1; got ratio=0.0"),
        ("topk:101%", "0 < ratio <= 1; got ratio=1.01"),
        ("topk:nan%", "'nan%' does not fit topk"),
        ("clip", "'' does not fit clip"),
        ("clip:one", "'one' does not fit clip"),
        ("clip:0", "0 < tau < infinity; got 0.0"),
        ("clip:-1", "0 < tau < infinity; got -1.0"),
        ("clip:inf", "0 < tau < infinity; got inf"),
        ("clip:nan", "0 < tau < infinity; got nan"),
    ],
)
def test_parse_says_which_part_is_wrong(spec, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse(spec)


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
def test_bad_top_k(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        TopK(**arguments)


@pytest.mark.parametrize("tau", [0.0, -1.0, math.inf, math.nan])
def test_bad_clip(tau):
    with pytest.raises(ValueError, match="0 < tau < infinity; got"):
        Clip(tau)


def test_more_entries_than_there_are():
    message = r"TopK needs 1 <= k <= 4 \(the number of parameters\); got k=5\. Pass ratio="
    with pytest.raises(ValueError, match=message):
        TopK(5)(G)
    with pytest.raises(ValueError, match=message):
        TopK(5).wire_bytes(4)
    assert torch.equal(TopK(4)(G), G)


def test_oracle_values():
    top = TopK(2)(G)
    assert top.tolist() == [3, 0, 2, 0]
    assert float((top - G).square().sum()) == 1.25
    clipped = Clip(2.0)(G)
    assert clipped.tolist() == pytest.approx([1.58943883, -0.52981294, 1.05962589, 0.26490647], abs=1e-8)
    assert float((clipped - G).norm()) == pytest.approx(1.774917217635375, abs=1e-14)
    assert Identity()(G) is G


@settings(deadline=None)
@given(g=gradients(), data=st.data())
def test_top_k_keeps_the_k_largest_the_first_of_equals(g, data):
    d = g.shape[-1]
    k = data.draw(st.integers(1, d))
    for row, out in zip(g.reshape(-1, d), TopK(k)(g).reshape(-1, d), strict=True):
        order = sorted(range(d), key=lambda i, row=row: (-abs(row[i].item()), i))
        expected = torch.zeros_like(row)
        expected[order[:k]] = row[order[:k]]
        assert torch.equal(out, expected)


@settings(deadline=None)
@given(g=gradients(), data=st.data())
def test_top_k_contracts(g, data):
    """||C(g) - g||^2 <= (1 - K/d) ||g||^2, in float64 for numbers that are exact in it."""
    k = data.draw(st.integers(1, g.shape[-1]))
    exact = g.double()
    error = (TopK(k)(g).double() - exact).square().sum(-1)
    bound = (1 - k / g.shape[-1]) * exact.square().sum(-1)
    assert bool((error <= bound * (1 + 1e-12)).all())


@each_dtype
def test_top_k_keeps_exactly_k_of_equals_and_of_infinities(dtype):
    ties = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0], dtype=dtype)
    assert TopK(2)(ties).tolist() == [1, -1, 0, 0, 0]
    mixed = torch.tensor([2.0, 1.0, -3.0, 1.0, 1.0], dtype=dtype)
    assert TopK(3)(mixed).tolist() == [2, 1, -3, 0, 0]
    endless = torch.tensor([1.0, math.inf, 5.0, -math.inf, math.inf], dtype=dtype)
    assert TopK(2)(endless).tolist() == [0, math.inf, 0, -math.inf, 0]
    unknown = torch.tensor([1.0, math.nan, 5.0, 2.0], dtype=dtype)
    assert TopK(2)(unknown).isnan().tolist() == [False, True, False, False]
    assert TopK(2)(unknown)[2] == 5


@pytest.mark.parametrize(
    ("ratio", "d", "k"), [(0.05, 669706, 33485), (0.001, 10, 1), (0.25, 10, 2), (0.35, 10, 4), (1.0, 7, 7), (0.5, 3, 2)]
)
def test_ratio_means_the_rounded_share(ratio, d, k):
    assert TopK(ratio=ratio).kept(d) == k == max(1, round(ratio * d))
    g = torch.arange(1.0, d + 1)
    assert int((TopK(ratio=ratio)(g) != 0).sum()) == k


@settings(deadline=None)
@given(g=gradients(), tau=st.floats(1e-2, 1e3))
def test_clip_bounds_the_norm_and_keeps_the_direction(g, tau):
    out = Clip(tau)(g).double()
    norm = g.double().norm(dim=-1, keepdim=True)
    slack = 1 + rounding(g.dtype, g.shape[-1])
    # entries below the smallest normal number round absolutely
    tiny = torch.finfo(g.dtype).tiny * math.sqrt(g.shape[-1])
    assert bool((out.norm(dim=-1) <= tau * slack + tiny).all())
    expected = g.double() * (tau / norm).clamp(max=1).nan_to_num(1.0)
    torch.testing.assert_close(out, expected, rtol=2 * slack - 2, atol=2 * tiny)
    within = norm.squeeze(-1) < tau / slack
    assert torch.equal(Clip(tau)(g)[within], g[within])  # bit for bit


@each_dtype
@pytest.mark.parametrize("fill", ["largest", "smallest"])
@pytest.mark.parametrize("tau", [1e-30, 1e-4, 1.0, 1e4, 1e30])
def test_clip_neither_overflows_nor_vanishes(dtype, fill, tau):
    """Where the norm or its square leaves the dtype's range, the direction and the length must still be right."""
    finfo = torch.finfo(dtype)
    magnitude = finfo.max if fill == "largest" else finfo.smallest_normal
    signs = torch.tensor([1.0, -1.0, 1.0, 1.0], dtype=dtype)
    out = Clip(tau)(signs * magnitude)
    exact = min(2.0 * magnitude, tau) / 2 if magnitude < 1e300 else tau / 2  # each of 4 equal entries
    expected = (signs.double() * exact).to(dtype)
    assert bool(out.isfinite().all())
    torch.testing.assert_close(out, expected, rtol=4 * finfo.eps, atol=0)


@pytest.mark.parametrize("tau", [5.0, 5.5, 1e300])
def test_clip_passes_what_is_within_bit_for_bit(tau):
    g = torch.tensor([3.0, 4.0])
    assert torch.equal(Clip(tau)(g), g)


@pytest.mark.parametrize("element_size", [2, 4, 8])
def test_wire_bytes(element_size):
    assert Identity().wire_bytes(10, element_size) == Clip(1.0).wire_bytes(10, element_size) == 10 * element_size
    assert TopK(3).wire_bytes(10, element_size) == 3 * (element_size + 4)
    assert TopK(ratio=0.2).wire_bytes(10, element_size) == 2 * (element_size + 4)


def workers_gradients(n: int = 3) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = {"b": (2, 3), "a": (), "c": (4,)}
    return {name: torch.randn(n, *shape, generator=g, dtype=torch.float64) for name, shape in shapes.items()}


def test_flatten_keeps_the_order_of_the_dict():
    grads = workers_gradients()
    flat = flatten(grads.values())
    assert flat.shape == (3, 11)
    for i in range(3):
        assert flat[i].tolist() == [*grads["b"][i].flatten().tolist(), grads["a"][i].item(), *grads["c"][i].tolist()]
        back = unflatten(flat[i], {name: g[i] for name, g in grads.items()})
        assert list(back) == ["b", "a", "c"]
        assert all(torch.equal(back[name], grads[name][i]) for name in grads)
    rows = unflatten(flat, {name: g[0] for name, g in grads.items()})
    assert all(torch.equal(rows[name], grads[name]) for name in grads)


@pytest.mark.parametrize("bias", [None, *OPERATORS], ids=repr)
def test_aggregate_is_the_mean_after_the_operator(bias):
    grads = flatten(workers_gradients().values())
    before = grads.clone()
    total, report = aggregate(grads, bias)
    rows = [row if bias is None else bias(row) for row in grads]
    expected = sum(rows) / len(rows)
    mean = grads.mean(0)
    torch.testing.assert_close(total, expected)
    assert torch.equal(grads, before)
    assert report["grad_norm"] == pytest.approx(float(expected.norm()))
    assert report["bias_error"] == pytest.approx(float((expected - mean).norm() / mean.norm()), abs=1e-14)
    assert report["wire_bytes"] == 3 * (bias or Identity()).wire_bytes(11, 8)


def test_operators_act_before_the_mean():
    """Two workers that agree on nothing: clipped one by one they cancel, clipped together they would not."""
    total, report = aggregate(torch.tensor([[8.0, 0.0], [-2.0, 0.0]]), Clip(1.0))
    assert total.tolist() == [0.0, 0.0]
    assert report["bias_error"] == 1.0


def test_aggregate_of_nothing_and_of_nan():
    assert aggregate(torch.zeros(2, 3), TopK(1))[1]["bias_error"] == 0.0
    for bias in (None, TopK(1), Clip(1.0)):
        total, report = aggregate(torch.tensor([[1.0, 2.0], [math.nan, 0.0]]), bias)
        assert math.isnan(report["grad_norm"])
        assert not bool(total.isfinite().all())


def test_each_dtype_comes_back_as_it_was():
    grads = {"a": torch.ones(2, 3, dtype=torch.float32), "b": torch.ones(2, 3, dtype=torch.float64)}
    total = unflatten(aggregate(flatten(grads.values()), Clip(1.0))[0], {name: g[0] for name, g in grads.items()})
    assert {name: t.dtype for name, t in total.items()} == {"a": torch.float32, "b": torch.float64}


def test_an_operator_of_ones_own():
    class Half(BiasOperator):
        def __call__(self, gradient: Tensor) -> Tensor:
            return gradient / 2

        @property
        def spec(self) -> str:
            return "half"

    total, report = aggregate(torch.tensor([[2.0, 4.0]]), Half())
    assert total.tolist() == [1, 2]
    assert report["bias_error"] == pytest.approx(0.5)
    with pytest.raises(TypeError, match="abstract"):
        BiasOperator()
