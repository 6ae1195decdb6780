"""Operators' values and constants, compositions, and operators of one's own."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operators import (
    LAYERWISE,
    RANDOM,
    G,
    assert_identical,
    each,
    each_dtype,
    gradients,
    rounding,
)
from torch import Tensor

import metamom.bias
from metamom import QSGD, Clip, ClipValue, Compose, Identity, Normalize, RandK, Sign, TopK
from metamom.bias import EF21, BiasOperator, Clip21, as_operator
from metamom.bias.coordinates import Coordinates


def test_oracle_values():
    """Worked by hand."""
    top = TopK(2)(G)
    assert top.tolist() == [3, 0, 2, 0]
    assert float((top - G).square().sum()) == 1.25
    assert (1 - TopK(2).contraction(4)) * float(G.square().sum()) == 7.125
    signs = Sign()(G)
    assert signs.tolist() == [1.625, -1.625, 1.625, 1.625]
    assert float((signs - G).square().sum()) == 3.6875
    clipped = Clip(2.0)(G)
    assert clipped.tolist() == pytest.approx([1.58943883, -0.52981294, 1.05962589, 0.26490647], abs=1e-8)
    assert float((clipped - G).norm()) == pytest.approx(1.774917217635375, abs=1e-14)
    assert Identity()(G) is G


def test_oracle_constants():
    """Theory §7.1: the contractive floor, the clipping floor, unscaled Rand-K."""
    assert TopK(ratio=0.25).constants(400, workers=7, zeta2=2.0) == (0.75, 1.5, 0, 0)
    assert TopK(ratio=0.25).constants(400, zeta2=2.0).floor == 6
    assert Clip(1.0).constants(5, zeta2=2.0, bound=4.0).floor == pytest.approx(2.5714285714285716, abs=1e-15)
    assert RandK(ratio=0.25).constants(400, workers=4, zeta2=2.0) == (0.5625, 0, 0.046875, 0.09375)
    assert Sign().constants(5, zeta2=2.0).floor == pytest.approx(4 * 2.0)
    assert RandK(1, scaled=True).constants(5, workers=2, zeta2=3.0) == pytest.approx((0, 0, 2, 6))
    assert RandK(1, scaled=True, shared=True).constants(5, workers=2, zeta2=3.0) == pytest.approx((0, 0, 4, 0))
    assert RandK(1, shared=True).constants(5, workers=2, zeta2=3.0) == pytest.approx((0.8, 0, 0, 0))
    assert QSGD(4).constants(9, workers=2, zeta2=3.0) == pytest.approx((0, 0, 9 / 32, 27 / 32))
    assert QSGD(2).constants(64, workers=2, zeta2=3.0) == pytest.approx((0, 0, 2, 6))
    assert Identity().constants(5, zeta2=2.0) == (0, 0, 0, 0)
    for bound in (0.0, 0.5, 1.0):
        assert Clip(1.0).constants(5, zeta2=2.0, bound=bound) == (0, 0, 0, 0)


def test_constants_layer_by_layer():
    assert TopK(1, per_tensor=True).constants(7, zeta2=2.0, sizes=[5, 2]) == pytest.approx((0.8, 1.6, 0, 0))
    assert Sign(per_tensor=True).contraction(7, [5, 2]) == 0.2
    assert RandK(1, per_tensor=True).constants(7, workers=2, zeta2=2.0, sizes=[5, 2]) == pytest.approx(
        (0.64, 0, 0.125, 0.25)
    )
    scaled = RandK(1, per_tensor=True, scaled=True)
    assert scaled.constants(7, workers=2, zeta2=2.0, sizes=[5, 2]) == pytest.approx((0, 0, 2, 4))
    assert scaled.contraction(4, [2, 2]) is None
    assert QSGD(2, per_tensor=True).constants(7, zeta2=2.0, sizes=[5, 2]) == pytest.approx((0, 0, 1.118034, 2.236068))


@each([TopK(2), RandK(2), QSGD(2), Clip(1.0), Sign(), Normalize(), EF21(Sign())])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"d": 0}, "d must be a whole number >= 1; got 0"),
        ({"d": -3}, "d must be a whole number >= 1; got -3"),
        ({"workers": 0}, "workers must be a whole number >= 1; got 0"),
        ({"workers": 2.5}, r"workers must be a whole number >= 1; got 2\.5"),
        ({"zeta2": -1}, "zeta2 must be >= 0 and finite; got -1"),
        ({"zeta2": math.nan}, "zeta2 must be >= 0 and finite; got nan"),
        ({"zeta2": math.inf}, "zeta2 must be >= 0 and finite; got inf"),
        ({"bound": -4.0}, r"bound must be >= 0 and finite; got -4\.0"),
        ({"bound": math.nan}, "bound must be >= 0 and finite; got nan"),
    ],
)
def test_constants_of_what_cannot_be(operator, arguments, message):
    with pytest.raises(ValueError, match=message):
        operator.constants(**{"d": 10, **arguments})


@each([ClipValue(1.0), Normalize(), Compose(TopK(1), Sign()), Clip(1.0), Clip(1.0, per_tensor=True), EF21(Sign())])
def test_constants_that_nobody_knows(operator):
    with pytest.raises(ValueError, match="constants"):
        operator.constants(5, sizes=[5])
    assert operator.contraction(5, [5]) is None


def test_a_floor_without_contraction_is_infinite():
    assert metamom.bias.Constants(1.0, 0.5, 0, 0).floor == math.inf


@settings(deadline=None, max_examples=40)
@given(g=gradients(min_d=1), tau=st.floats(1e-2, 1e3))
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
    assert_identical(Clip(tau)(g)[within], g[within])


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


@settings(deadline=None, max_examples=40)
@given(g=gradients(min_d=1), c=st.floats(1e-2, 1e3))
def test_clip_value_is_entry_by_entry(g, c):
    expected = [max(-c, min(c, x)) for x in g.double().flatten().tolist()]
    eps = torch.finfo(g.dtype).eps
    assert ClipValue(c)(g).flatten().tolist() == pytest.approx(expected, rel=eps)


@settings(deadline=None, max_examples=40)
@given(g=gradients(min_d=1))
def test_normalize_divides_by_the_norm(g):
    out, exact = Normalize()(g).double(), g.double()
    norm = exact.norm(dim=-1, keepdim=True)
    expected = torch.where(norm > 0, exact / norm, 0)
    tiny = torch.finfo(g.dtype).tiny
    torch.testing.assert_close(out, expected, rtol=rounding(g.dtype, g.shape[-1]), atol=tiny)


@settings(deadline=None, max_examples=40)
@given(g=gradients(min_d=1))
def test_sign_and_its_exact_error(g):
    """||C(g) - g||^2 = ||g||^2 - ||g||_1^2 / d where no entry is zero, else no more (docs/theory/operators.md)."""
    exact, d = g.double().reshape(-1, g.shape[-1]), g.shape[-1]
    error = (Sign()(exact) - exact).square().sum(-1)
    equal = exact.square().sum(-1) - exact.abs().sum(-1).square() / d
    scale = 1e-13 * (1 + exact.square().sum(-1))
    assert bool((error <= equal + scale).all())
    assert bool(((error >= equal - scale) | (exact == 0).any(-1)).all())
    rough = Sign()(g).double().view_as(exact)
    torch.testing.assert_close(rough, Sign()(exact), rtol=4 * torch.finfo(g.dtype).eps, atol=torch.finfo(g.dtype).tiny)


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_bad_bounds(value):
    for make in (Clip, ClipValue, Clip21):
        with pytest.raises(ValueError, match="> 0 and finite; got"):
            make(value)


@pytest.mark.parametrize("levels", [0, -1, 2.0, True, 2**30])
def test_bad_levels(levels):
    with pytest.raises(ValueError, match="whole number of levels"):
        QSGD(levels)


@pytest.mark.parametrize("operators", [(), (Sign(),)])
def test_a_composition_of_too_few(operators):
    with pytest.raises(ValueError, match=f"two operators or more; got {len(operators)}"):
        Compose(*operators)


@pytest.mark.parametrize("member", [EF21(Sign()), Sign, abs, None], ids=["feedback", "class", "function", "none"])
def test_what_cannot_be_composed(member):
    with pytest.raises(TypeError, match="operators without error feedback"):
        Compose(Sign(), member)


def test_compose_goes_from_left_to_right():
    torch.testing.assert_close(Compose(Clip(1.0), TopK(2))(G), TopK(2)(Clip(1.0)(G)))
    torch.testing.assert_close(Compose(TopK(2), Clip(1.0))(G), Clip(1.0)(TopK(2)(G)))
    both = Compose(TopK(3, per_tensor=True), TopK(1))
    assert both(torch.arange(1.0, 9.0), sizes=[4, 4]).tolist() == [0] * 7 + [8]


def test_functions_are_operators_too():
    double = as_operator(lambda g: 2 * g)
    assert double(torch.ones(2, 3)).tolist() == [[2.0] * 3] * 2
    assert as_operator(None) is None
    assert as_operator(double) is double
    assert as_operator(math.sin).spec == "sin"
    clipped = as_operator(lambda g: g.clamp_(-1, 1))  # in place, which changes nobody else's tensor
    g = G.repeat(2, 1)
    assert clipped(g)[1].tolist() == [1, -1, 1, 0.5]
    assert torch.equal(g, G.repeat(2, 1))
    for bad in (3, ("topk:5%",), Sign):
        with pytest.raises(TypeError, match="a bias is an operator"):
            as_operator(bad)


def test_an_operator_of_ones_own():
    class Half(BiasOperator):
        def _apply(self, rows: Tensor, place: Coordinates) -> Tensor:
            return rows / 2

        @property
        def spec(self) -> str:
            return "half"

    assert Half()(G).tolist() == [1.5, -0.5, 1, 0.25]
    assert Half().wire_bytes(4) == 16
    torch.testing.assert_close(Half().decode(Half().encode(G), 4, G.dtype), G / 2)
    with pytest.raises(TypeError, match="abstract"):
        BiasOperator()


def test_state_for_an_operator_that_has_none():
    Sign().load_state_dict({})
    with pytest.raises(ValueError, match="sign carries no state; got calls"):
        Sign().load_state_dict({"calls": 3})


@each(RANDOM + LAYERWISE)
def test_a_step_given_leaves_the_counter_alone(operator):
    operator.reset()
    before = operator.state_dict()
    operator(G, step=7, sizes=[1, 3])
    assert operator.state_dict() == before
