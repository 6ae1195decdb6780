"""One suite for every bias operator: what all of them promise, their spelling, and known values."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operators import (
    DTYPES,
    EVERY,
    LAYERWISE,
    PLAIN,
    RANDOM,
    STATELESS,
    G,
    assert_identical,
    cut,
    each,
    each_dtype,
    gradients,
    rounding,
)
from torch import Tensor

import metamom.bias
from metamom import QSGD, Clip, ClipValue, Compose, Identity, Normalize, RandK, Sign, TopK
from metamom.bias import EF14, EF21, EF21SGDM, BiasOperator, Clip21, NonFiniteError, as_operator, parse
from metamom.bias.coordinates import Coordinates
from metamom.bias.spec import spec_help, spellings

# what every operator promises


@each(EVERY)
@settings(deadline=None, max_examples=12)
@given(g=gradients())
def test_every_operator(operator, g):
    operator.reset()
    before = g.clone()
    sizes = cut(g.shape[-1])
    out = operator(g, step=3, sizes=sizes)
    assert out.shape == g.shape
    assert out.dtype == g.dtype
    assert bool(out.isfinite().all())
    assert_identical(g, before)
    operator.reset()
    assert_identical(out, operator(g, step=3, sizes=sizes))
    assert bool((out * g >= 0).all()), "an entry changed its sign"


@each(PLAIN + LAYERWISE)
@settings(deadline=None, max_examples=12)
@given(g=gradients(rows=3))
def test_workers_at_once_or_one_by_one(operator, g):
    sizes = cut(g.shape[-1])
    rows = [operator(row, step=2, workers=[i], sizes=sizes) for i, row in enumerate(g)]
    # norms may be summed in another order in a batch
    out = operator(g, step=2, sizes=sizes)
    torch.testing.assert_close(out, torch.stack(rows), rtol=rounding(g.dtype, g.shape[-1]), atol=0)


@each(EVERY)
@each_dtype
def test_zero_stays_zero(operator, dtype):
    operator.reset()
    zeros = torch.zeros(2, 5, dtype=dtype)
    for _ in range(2):
        assert torch.equal(operator(zeros, step=0, sizes=cut(5)), zeros)


@each_dtype
@pytest.mark.parametrize("g", [-2.5, 0.0])
@each([Identity(), TopK(1), TopK(ratio=0.1), TopK(1, ties="all"), RandK(1), RandK(1, scaled=True), Sign(), QSGD(3)])
def test_one_entry_is_sent_as_it_is(operator, g, dtype):
    one = torch.tensor([g], dtype=dtype)
    assert torch.equal(operator(one), one)


@each(STATELESS)
def test_three_dimensions_and_strides(operator):
    g = torch.randn(3, 6, 2, generator=torch.Generator().manual_seed(0)).transpose(1, 2)
    expected = operator(g.contiguous().view(6, 6), step=1, sizes=cut(6)).view(3, 2, 6)
    torch.testing.assert_close(operator(g, step=1, sizes=cut(6)), expected)


@each(EVERY)
@each_dtype
def test_what_is_not_finite_is_refused(operator, dtype):
    operator.reset()
    before = operator.state_dict()
    for bad in (math.nan, math.inf, -math.inf):
        g = torch.tensor([[1.0, -2.0, 3.0, 0.0, 0.0], [1.0, -2.0, bad, 0.0, 4.0]], dtype=dtype)
        with pytest.raises(NonFiniteError, match="1 entries of the gradients are infinite or NaN, the first in row 1"):
            operator(g, sizes=cut(5))
    assert operator.state_dict() == before


@each([operator for operator in EVERY if not operator.feeds_back])
def test_messages_of_what_is_not_finite_are_refused(operator):
    with pytest.raises(NonFiniteError):
        operator.encode(torch.tensor([1.0, math.nan, 3.0]), sizes=cut(3))


def test_infinities_that_cancel_or_overflow_in_a_sum():
    with pytest.raises(NonFiniteError, match="2 entries"):
        Identity()(torch.tensor([math.inf, 1.0, -math.inf]))
    for dtype in DTYPES:
        large = torch.full((3,), torch.finfo(dtype).max, dtype=dtype)
        assert torch.equal(Identity()(large), large)


@each([op for op in PLAIN if "qsgd" not in op.spec])
@each_dtype
@pytest.mark.parametrize("fill", ["largest", "smallest"])
def test_no_plain_operator_overflows(operator, dtype, fill):
    """Sums and squares leave the dtype's range here; the results need not."""
    finfo = torch.finfo(dtype)
    magnitude = finfo.max if fill == "largest" else finfo.smallest_normal
    g = torch.tensor([1.0, -1.0, 0.0, 1.0, 1.0], dtype=dtype) * magnitude
    out = operator(g)
    assert bool(out.isfinite().all())
    assert bool((out * g.sign() >= 0).all())
    assert bool(out.any()) or operator.spec.startswith("clip:0.001")


LARGE = [Sign(), QSGD(1), QSGD(4), QSGD(16), RandK(3, scaled=True), RandK(ratio=0.3, scaled=True), *PLAIN]


@each(LARGE + LAYERWISE)
@each_dtype
@pytest.mark.parametrize("d", [4, 7, 100])
def test_the_largest_numbers_overflow_only_where_the_exact_result_does(operator, dtype, d):
    """The same signs and draws at magnitude one, in float64, say by how much each entry exceeds the largest number."""
    finfo = torch.finfo(dtype)
    signs = torch.ones(2, d, dtype=torch.float64)
    signs[0, 1::3], signs[1] = -1, 1e-3  # only the first row may overflow
    g = signs.to(dtype) * finfo.max
    if operator.spec.startswith(("clip", "normalize")):  # by absolute numbers
        assert bool(operator(g, step=1, sizes=cut(d)).isfinite().all())
        return
    exact = operator(signs, step=1, sizes=cut(d))
    if float(exact.abs().max()) <= 1 + 4 * finfo.eps:
        out = operator(g, step=1, sizes=cut(d))
        assert bool(out.isfinite().all())
        torch.testing.assert_close(out[0].double() / finfo.max, exact[0], rtol=rounding(dtype, d), atol=0)
    else:
        with pytest.raises(
            NonFiniteError, match=rf"finite gradient in row 0 .*beyond the range of {dtype}.*wider dtype"
        ):
            operator(g, step=1, sizes=cut(d))


@each([QSGD(16), QSGD(1), RandK(ratio=0.3, scaled=True), Compose(Sign(), QSGD(1))])
@each_dtype
def test_more_than_the_dtype_holds_is_refused(operator, dtype):
    g = torch.ones(2, 40_000, dtype=dtype)
    g[1] *= torch.finfo(dtype).max
    before = operator.state_dict()
    spec = operator.spec.split("+")[-1]
    with pytest.raises(NonFiniteError, match=rf"{spec} takes the finite gradient in row 1 .*range of {dtype}"):
        operator(g)
    with pytest.raises(NonFiniteError, match="beyond the range"):
        operator.encode(g[1])
    assert operator.state_dict() == before


@each_dtype
def test_a_mean_magnitude_is_no_more_than_the_largest(dtype):
    largest = torch.finfo(dtype).max
    g = torch.full((2, 40_000), largest, dtype=dtype)
    g[1] = 1
    assert_identical(Sign()(g), g)
    assert_identical(Sign().decode(Sign().encode(g[0]), 40_000, dtype), g[0])


@each([Identity(), RandK(1), EF21(TopK(1))])
@pytest.mark.parametrize(
    ("g", "error", "message"),
    [
        (torch.ones(3, dtype=torch.int64), TypeError, "floating-point gradients; got torch.int64"),
        (torch.tensor(1.0), ValueError, r"d >= 1; got shape \(\)"),
        (torch.ones(2, 0), ValueError, r"d >= 1; got shape \(2, 0\)"),
    ],
)
def test_what_is_no_gradient(operator, g, error, message):
    with pytest.raises(error, match=message):
        operator(g)
    if not operator.feeds_back:
        with pytest.raises(error, match=message):
            operator.encode(g)


@each(LAYERWISE)
@settings(deadline=None, max_examples=10)
@given(g=gradients(rows=2))
def test_layer_by_layer_is_each_layer_by_itself(operator, g):
    """A slow twin: the same operator on whole gradients, for each parameter tensor; draws are numbered by tensor."""
    if isinstance(operator, Compose):
        operator = operator.operators[0]
    whole = parse(operator.spec.replace(":tensor", ""))
    parts = torch.split(g, cut(g.shape[-1]), -1)
    expected = torch.cat([whole._apply(part, Coordinates(4, range(2), tensor=i)) for i, part in enumerate(parts)], -1)
    assert_identical(operator(g, step=4, sizes=cut(g.shape[-1])), expected)


@each([op for op in LAYERWISE if not isinstance(op, Compose)])
def test_layers_must_be_told(operator):
    with pytest.raises(ValueError, match="pass sizes="):
        operator(torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"add up to the gradient's 4 entries; got \[2, 3\]"):
        operator(torch.ones(2, 4), sizes=[2, 3])
    torch.testing.assert_close(
        operator(G, step=0, sizes=[0, 4, 0]), operator(G, step=0, sizes=[4])
    )  # tensors of no entries


# their spelling


@each(EVERY)
def test_spec_names_the_operator(operator):
    assert parse(operator.spec) == operator
    assert parse(f" {operator.spec} ") == operator


@each(EVERY)
def test_operators_are_values(operator):
    again = eval(repr(operator), vars(metamom.bias))
    assert again == operator
    assert hash(again) == hash(operator)
    assert [other == operator for other in EVERY].count(True) == 1
    assert len({*EVERY, again}) == len(EVERY)
    assert operator != operator.spec


@settings(deadline=None, max_examples=30)
@given(ratio=st.floats(1e-12, 1.0, exclude_min=True), x=st.floats(1e-300, 1e300), n=st.integers(1, 2**30 - 1))
def test_specs_lose_no_digit(ratio, x, n):
    for operator in (
        TopK(ratio=ratio),
        RandK(ratio=ratio, seed=n),
        TopK(n),
        Clip(x),
        ClipValue(x),
        QSGD(n),
        Clip21(x),
        EF21SGDM(Compose(Clip(x), TopK(n)), eta=ratio),
    ):
        assert parse(operator.spec) == operator


@pytest.mark.parametrize(
    ("spec", "operator"),
    [
        ("none", Identity()),
        ("topk:33500", TopK(33500)),
        ("topk:5%", TopK(ratio=0.05)),
        ("topk:0.1%", TopK(ratio=0.001)),
        ("topk:7%", TopK(ratio=0.07)),
        ("topk:100%", TopK(ratio=1.0)),
        ("topk:5%:tensor", TopK(ratio=0.05, per_tensor=True)),
        ("topk:5:all:tensor", TopK(5, per_tensor=True, ties="all")),
        ("randk:1%", RandK(ratio=0.01)),
        ("randk:7:scaled:shared:seed=3", RandK(7, scaled=True, shared=True, seed=3)),
        ("clip:1.0", Clip(1)),
        ("clip:1e-3", Clip(0.001)),
        ("clip:1e+3+topk:5%", Compose(Clip(1000), TopK(ratio=0.05))),
        ("clipvalue:0.01", ClipValue(0.01)),
        ("normalize", Normalize()),
        ("normalize:tensor", Normalize(per_tensor=True)),
        ("sign", Sign()),
        ("sign:tensor", Sign(per_tensor=True)),
        ("qsgd:16", QSGD(16)),
        ("clip:1+topk:5%", Compose(Clip(1.0), TopK(ratio=0.05))),
        ("clip:1+topk:5%+sign", Compose(Clip(1.0), TopK(ratio=0.05), Sign())),
        ("ef14:topk:1%", EF14(TopK(ratio=0.01))),
        ("ef21:topk:1%", EF21(TopK(ratio=0.01))),
        ("ef21-sgdm(0.1):topk:1%", EF21SGDM(TopK(ratio=0.01), eta=0.1)),
        ("ef21-sgdm(1):clip:1+topk:1%", EF21SGDM(Compose(Clip(1.0), TopK(ratio=0.01)), eta=1)),
        ("clip21:1", Clip21(1.0)),
    ],
)
def test_parse(spec, operator):
    assert parse(spec) == operator


@pytest.mark.parametrize(
    ("operator", "spec"),
    [
        (TopK(ratio=0.07), "topk:7%"),
        (TopK(ratio=0.5), "topk:50%"),
        (Clip(2), "clip:2"),
        (Clip(0.5), "clip:0.5"),
        (EF21SGDM(Sign(), 1), "ef21-sgdm(1):sign"),
        (Clip21(2), "clip21:2"),
        (Compose(Compose(Clip(1), Sign()), TopK(1)), "clip:1+sign+topk:1"),
    ],
)
def test_specs_are_short(operator, spec):
    assert operator.spec == spec
    assert parse(spec) == operator


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "unknown operator ''; wanted none, clip:TAU, clip21:TAU, clipvalue:C,"),
        ("none:1", "none has no option '1'"),
        ("TopK:3", "unknown operator 'TopK:3'"),
        ("topk", "topk needs a number behind a colon"),
        ("topk:", "topk needs a number behind a colon"),
        ("topk:1.5", "'1.5' does not fit topk"),
        ("topk:0", "does not fit topk: TopK needs a whole number k >= 1; got k=0"),
        ("topk:-3", "whole number k >= 1; got k=-3"),
        ("topk:%", "'%' does not fit topk"),
        ("topk:0%", "0 < ratio <= 1; got ratio=0.0"),
        ("topk:101%", "0 < ratio <= 1; got ratio=1.01"),
        ("topk:nan%", "'nan%' does not fit topk"),
        ("topk:5%:scaled", "topk has no option 'scaled'"),
        ("topk:5%:tensor=no", "topk has no option 'tensor=no'"),
        ("topk:5%:", "topk has no option ''"),
        ("randk:150%", "RandK needs a share 0 < ratio <= 1; got ratio=1.5"),
        ("randk:5:all", "randk has no option 'all'"),
        ("randk:5:seed", "randk has no option 'seed'"),
        ("randk:5:seed=x", "'x'"),
        ("topk:1e99999999999999999999%", "topk's percentage must be a number; wanted a number, such as 5, 0.1 or 1e-3"),
        ("topk:1e-99999999999999999999%", "0 < ratio <= 1; got ratio=0.0"),
        ("randk:5:seed=-1", "'seed=-1' does not fit randk: a seed is a whole number, 0 <= seed < 2^64; got -1"),
        ("qsgd:4:seed=-1", "'seed=-1' does not fit qsgd: a seed is a whole number, 0 <= seed < 2^64; got -1"),
        (f"qsgd:4:tensor:seed={2**64}", f"'seed={2**64}' does not fit qsgd: a seed is"),
        ("randk:1%:seed=", "randk's seed must be a whole number; wanted a whole number, in the digits 0 to 9; got ''"),
        ("clip", "clip needs a number behind a colon"),
        ("clip:one", "'one' does not fit clip"),
        ("clip:0", "does not fit clip: Clip needs a norm tau > 0 and finite; got 0.0"),
        ("clip:-1", "tau > 0 and finite; got -1.0"),
        ("clip:inf", "'inf' does not fit clip: clip's TAU must be a number"),
        ("clip:nan", "'nan' does not fit clip: clip's TAU must be a number"),
        ("clipvalue:0", "does not fit clipvalue: ClipValue needs a bound c > 0 and finite; got 0.0"),
        ("normalize:1", "normalize has no option '1'"),
        ("sign:all", "sign has no option 'all'"),
        ("qsgd:0", "does not fit qsgd: QSGD needs a whole number of levels, 1 <= levels < 2^30; got 0"),
        ("qsgd:2.5", "'2.5' does not fit qsgd"),
        ("clip:1+", "unknown operator ''"),
        ("clip:1++sign", "unknown operator ''"),
        ("clip:1+bottomk:3", "bias operator 'clip:1+bottomk:3': unknown operator 'bottomk:3'"),
        ("clip:1+ef14:sign", "error feedback stands once, in front of all that it goes around; got 'ef14:sign'"),
        ("ef14:ef21:sign", "error feedback stands once, in front of all that it goes around; got 'ef21:sign'"),
        ("ef14:", "unknown operator ''"),
        ("ef21", "unknown operator 'ef21'"),
        ("ef21:topk:0", "k >= 1; got k=0"),
        ("ef21-sgdm:sign", "unknown operator 'ef21-sgdm:sign'"),
        ("ef21-sgdm(0):sign", "0 < eta <= 1; got 0.0"),
        ("ef21-sgdm(1.5):sign", "0 < eta <= 1; got 1.5"),
        ("ef21-sgdm(x):sign", "'x'"),
        ("clip21:0", "tau > 0 and finite; got 0.0"),
        ("clip21:1:tensor", "clip21 has no option 'tensor'"),
        ("ef14:clip21:1", "an operator without it; got Clip21(1.0)"),
        ("randk:5:seed=1:seed=2", "randk has an option twice: 'seed=2'"),
        ("topk:1_000", "got '1_000'"),
        ("topk:١٢", r"printable ASCII; got '\u0661' as its character 6"),
        ("topk:5%\u2028", r"printable ASCII; got '\u2028' as its character 8"),
        ("topk:5%\n", r"printable ASCII; got '\n' as its character 8"),
    ],
)
def test_parse_says_which_part_is_wrong(spec, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        parse(spec)
    assert str(caught.value).startswith(f"bias operator {spec!r}: ")


def test_the_help_lists_what_the_parser_takes():
    """Each operator with each option: those in its line of the table are taken, the others refused."""
    table = spec_help().splitlines()
    assert max(map(len, table)) <= 100
    examples = {"K": "3", "P%": "5%", "TAU": "0.5", "C": "0.5", "LEVELS": "4", "A": "sign", "B": "sign", "ETA": "0.1"}
    values = {"tensor": "", "all": "", "scaled": "", "shared": "", "seed": "=7"}
    assert [line.split()[0] for line in table[-len(values) :]] == [":tensor", ":all", ":scaled", ":shared", ":seed=N"]
    for spelling in spellings():
        (line,) = [line for line in table if f"  {spelling} " in line]
        example = re.sub("|".join(examples), lambda match: examples[match[0]], spelling)
        assert parse(example).spec == example
        listed = set(re.findall(r" :(\w+)", line))
        assert listed <= set(values)
        for option, value in values.items():
            if option in listed:
                assert parse(f"{example}:{option}{value}").spec == f"{example}:{option}{value}"
            elif not spelling.endswith((":A", "+B")):  # what stands around A leaves the options to it
                with pytest.raises(ValueError, match=f"has no option '{option}{value}'"):
                    parse(f"{example}:{option}{value}")


# values, constants and users' own


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
    """||C(g) - g||^2 = ||g||^2 - ||g||_1^2 / d where no entry is zero, and no more where one is (docs/theory.md)."""
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
