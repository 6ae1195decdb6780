"""What every bias operator promises."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from operators import (
    DTYPES,
    EVERY,
    FROM_ZERO,
    LAYERWISE,
    PLAIN,
    QUIET,
    STATELESS,
    G,
    assert_identical,
    cut,
    each,
    each_dtype,
    gradients,
    rounding,
)

from metamom import QSGD, Compose, Identity, RandK, Sign, TopK
from metamom.bias import EF21, NonFiniteError, parse
from metamom.bias.coordinates import Coordinates


@each(EVERY)
@settings(deadline=None, max_examples=8)
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
    assert operator not in QUIET or bool((out * g >= 0).all()), "an entry changed its sign"


@each(PLAIN + LAYERWISE)
@settings(deadline=None, max_examples=8)
@given(g=gradients(rows=3))
def test_workers_at_once_or_one_by_one(operator, g):
    sizes = cut(g.shape[-1])
    rows = [operator(row, step=2, workers=[i], sizes=sizes) for i, row in enumerate(g)]
    # norms may be summed in another order in a batch
    out = operator(g, step=2, sizes=sizes)
    torch.testing.assert_close(out, torch.stack(rows), rtol=rounding(g.dtype, g.shape[-1]), atol=0)


@each(FROM_ZERO)
def test_zero_stays_zero(operator):
    for dtype in DTYPES:
        operator.reset()
        zeros = torch.zeros(2, 5, dtype=dtype)
        for _ in range(2):
            assert torch.equal(operator(zeros, step=0, sizes=cut(5)), zeros), dtype


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
def test_what_is_not_finite_is_refused(operator):
    operator.reset()
    before = operator.state_dict()
    for dtype, bad in itertools.product(DTYPES, (math.nan, math.inf, -math.inf)):
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
@pytest.mark.parametrize("fill", ["max", "smallest_normal"])
def test_no_plain_operator_overflows(operator, fill):
    """Sums and squares leave the dtype's range here; the results need not."""
    for dtype in DTYPES:
        g = torch.tensor([1.0, -1.0, 0.0, 1.0, 1.0], dtype=dtype) * getattr(torch.finfo(dtype), fill)
        out = operator(g)
        assert bool(out.isfinite().all()), dtype
        assert bool((out * g.sign() >= 0).all()), dtype
        assert bool(out.any()) or operator.spec.startswith("clip:0.001"), dtype


LARGE = [Sign(), QSGD(1), QSGD(4), QSGD(16), RandK(3, scaled=True), RandK(ratio=0.3, scaled=True), *PLAIN]


@each(LARGE + LAYERWISE)
@each_dtype
def test_the_largest_numbers_overflow_only_where_the_exact_result_does(operator, dtype):
    """The same signs and draws at magnitude one, in float64, say by how much each entry exceeds the largest number."""
    for d in (4, 7, 100):
        check_largest(operator, dtype, d)


def check_largest(operator, dtype, d):
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
def test_layers_must_be_given(operator):
    with pytest.raises(ValueError, match="pass sizes="):
        operator(torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"add up to the gradient's 4 entries; got \[2, 3\]"):
        operator(torch.ones(2, 4), sizes=[2, 3])
    torch.testing.assert_close(
        operator(G, step=0, sizes=[0, 4, 0]), operator(G, step=0, sizes=[4])
    )  # tensors of no entries
