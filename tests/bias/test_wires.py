"""Natural compression, TernGrad and 8-bit blocks: worked examples, every outcome counted, sharp constants, bytes."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operators import DTYPES, assert_identical, each, each_dtype
from torch import Tensor

from metamom import Block8, Natural, TernGrad
from metamom.bias import NonFiniteError
from metamom.bias.block8 import dynamic_codes, linear_codes
from metamom.bias.constants import nearest_loss, random_omega
from metamom.bias.rounding import even_code, nearest_code, random_code

HAND = torch.tensor([3.0, -1.25, 0.0, 0.7], dtype=torch.float64)


def outcomes(operator, g: Tensor, monkeypatch) -> tuple[Tensor, Tensor]:
    """The mean and second moment over all outcomes: at most two values of each entry, drawn independently.

    A number u on [0, 1) decides between them, the larger one below p. Bisection finds p to 2^-50.
    """

    def image(u: Tensor) -> Tensor:
        monkeypatch.setattr(type(operator), "_uniforms", lambda self, at, n, count, device: u.expand(n, count))
        return operator(g, step=0)

    high, low = image(torch.zeros_like(g)), image(torch.full_like(g, 1 - 2.0**-53))
    below, above = torch.zeros_like(g), torch.ones_like(g)
    for _ in range(51):
        middle = (below + above) / 2
        drawn = image(middle) == high
        below, above = torch.where(drawn, middle, below), torch.where(drawn, above, middle)
    p = torch.where(high == low, 1, (below + above) / 2)
    return p * high + (1 - p) * low, p * high.square() + (1 - p) * low.square()


UNBIASED = [
    Natural(),
    TernGrad(),
    Block8(random=True),
    Block8(3, random=True),
    Block8(random=True, dynamic=True),
]


@each(UNBIASED)
@settings(deadline=None, max_examples=10)
@given(entries=st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=7))
def test_no_bias_and_no_more_variance_than_omega(operator, entries):
    g = torch.tensor(entries, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        mean, square = outcomes(operator, g, patch)
    torch.testing.assert_close(mean, g, rtol=1e-10, atol=1e-12 * float(g.abs().max()))
    length = float(g.square().sum())
    assert float(square.sum()) - length <= (operator.constants(len(g)).M + 1e-9) * length
    if isinstance(operator, TernGrad):
        assert float(square.sum()) == pytest.approx(float(g.abs().max() * g.abs().sum()), rel=1e-10)


@each(UNBIASED)
def test_both_outcomes_of_each_entry_by_their_share(operator):
    """The draws themselves, not numbers put in their place: means of 4,000 within five standard errors."""
    out = operator(HAND.expand(4000, -1), step=3)
    assert all(len(set(column.tolist())) <= 2 for column in out.T)
    assert bool(((out.mean(0) - HAND).abs() <= 5 * out.std(0) / math.sqrt(4000) + 1e-12).all())


def test_natural_by_hand():
    """3 is 2 (1 + 1/2), 1.25 is 1 + 1/4, 0.7 is 1/2 (1 + 2/5)."""
    seen = {tuple(Natural()(HAND, step=step).tolist()) for step in range(200)}
    assert seen == set(itertools.product([2.0, 4.0], [-1.0, -2.0], [0.0], [0.5, 1.0]))
    assert Natural(nearest=True)(HAND).tolist() == [4, -1, 0, 0.5]
    worst = torch.tensor([4 / 3, -2 / 3, 8 / 3], dtype=torch.float64)
    variance = float(((worst / 4 * 3 * 1.0) ** 2).sum())  # (1/3)(2/3) 2^(2e), with 4/3 2^e
    assert variance * Fraction(2, 9) == pytest.approx(float(worst.square().sum()) / 8)
    tie = torch.tensor([1.5, -0.75], dtype=torch.float64)
    error = float((Natural(nearest=True)(tie) - tie).square().sum())
    assert error == pytest.approx((1 - Natural(nearest=True).contraction(2)) * float(tie.square().sum()), rel=1e-15)


@each_dtype
@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_natural_is_one_of_two_powers(dtype, data):
    """Against `math.frexp`, entry by entry; below the smallest normal number of the wide dtype, zero or that."""
    wide = torch.promote_types(dtype, torch.float32)
    g = torch.tensor([data.draw(st.floats(-3e4, 3e4)) for _ in range(4)]).to(dtype)
    tiny = torch.finfo(wide).tiny
    for x, out in zip(g.double().tolist(), Natural()(g, step=1).double().tolist(), strict=True):
        power = math.ldexp(0.5, math.frexp(abs(x))[1]) if x else 0.0
        pair = {0.0, tiny} if abs(x) < tiny else {power, 2 * power} if power != abs(x) else {power}
        assert abs(out) in pair
        assert math.copysign(1, out) == math.copysign(1, x)


def test_natural_below_normal_numbers_and_beyond_the_largest():
    u = torch.finfo(torch.float32).tiny
    out = Natural()(torch.full((2000,), 0.25 * u), step=0)
    assert set(out.tolist()) == {0.0, u}
    assert float((out == u).double().mean()) == pytest.approx(0.25, abs=0.05)
    for dtype in DTYPES:
        largest = torch.full((50,), torch.finfo(dtype).max, dtype=dtype)
        for operator in (Natural(), Natural(nearest=True)):
            with pytest.raises(NonFiniteError, match=r"natural.* takes the finite gradient in row 0"):
                operator(largest)
            with pytest.raises(NonFiniteError, match="beyond the range"):
                operator.encode(largest)


def test_terngrad_by_hand():
    seen = {tuple(TernGrad()(HAND, step=step).tolist()) for step in range(100)}
    assert seen == set(itertools.product([3.0], [-3.0, 0.0], [0.0], [0.0, 3.0]))
    for d in (2, 9, 100):  # the gradient that attains omega
        g = torch.full((d,), 1 / (math.sqrt(d) + 1), dtype=torch.float64)
        g[0] = 1
        omega = float(g.abs().sum() / g.square().sum()) - 1
        assert omega == pytest.approx((math.sqrt(d) - 1) / 2, rel=1e-12)
        assert TernGrad().constants(d, workers=2, zeta2=3.0) == pytest.approx((0, 0, omega / 2, 1.5 * omega))
    assert TernGrad().contraction(4) == 0.5
    assert TernGrad().contraction(9) is None


@pytest.mark.parametrize("clip", [0.5, 1.0, 2.5])
def test_terngrad_clips_to_a_multiple_of_the_root_mean_square(clip, monkeypatch):
    g = torch.tensor([10.0, -1.0, 1.0, 2.0, 0.5, 0.0], dtype=torch.float64)
    limit = min(10.0, clip * math.sqrt(106.25 / 6))
    clipped = g.clamp(-limit, limit)
    operator = TernGrad(clip=clip)
    mean, square = outcomes(operator, g, monkeypatch)
    torch.testing.assert_close(mean, clipped, rtol=1e-10, atol=1e-12)
    assert float(square.sum()) == pytest.approx(limit * float(clipped.abs().sum()), rel=1e-10)
    assert float(square.sum()) <= clip * float(g.square().sum())
    with pytest.raises(ValueError, match=r"no constants are known for terngrad:clip="):
        operator.constants(6)


def test_clipping_leaves_equal_entries_alone():
    for one in (torch.tensor([-2.0]), torch.full((5,), 3.0)):
        assert torch.equal(TernGrad(clip=2.5)(one), one)


def test_blocks_by_hand():
    g = torch.tensor([127.0, 3.4, -3.5, -3.6, 0.5, 0.3])
    assert Block8(4)(g).tolist() == pytest.approx([127, 3, -3, -4, 0.5, 76 * 0.5 / 127])  # 0.3 is 76.2 units
    assert linear_codes()[:2] == (0, 1 / 127)
    codes = dynamic_codes()
    assert len(codes) == 128
    assert codes[1:4] == pytest.approx((1e-6, 5.5e-6, 1e-5))
    assert codes[63:65] == pytest.approx((0.1, 0.1 + 0.9 / 64))
    assert list(codes) == sorted(set(codes))
    message = Block8(4).encode(g)
    assert message[:8].view(torch.float32).tolist() == [127, 0.5]
    assert message[8:].tolist() == [254, 130, 124, 123, 254, 203]
    with pytest.raises(ValueError, match="holds codes beyond 127"):
        Block8(4).decode(torch.cat([message[:-1], torch.tensor([255], dtype=torch.uint8)]), 6, torch.float32)


@pytest.mark.parametrize("block", [1, 2, 3, 5, 100])
def test_blocks_are_each_by_itself(block):
    """A slow twin, in Python's numbers."""
    g = torch.randn(11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for dynamic in (False, True):
        codes = dynamic_codes() if dynamic else linear_codes()
        expected = []
        for start in range(0, 11, block):
            part = g[start : start + block].tolist()
            scale = max(map(abs, part))
            expected += [math.copysign(scale * min(codes, key=lambda c: abs(abs(x) / scale - c)), x) for x in part]
        assert Block8(block, dynamic=dynamic)(g).tolist() == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("codes", [[0.0, 1.0], linear_codes(), dynamic_codes(), (0.0, 0.1, 0.5, 1.0)], ids=len)
@pytest.mark.parametrize("d", [1, 2, 5, 2048, 10**6])
def test_constants_of_a_code_book_against_a_grid(codes, d):
    """Equal entries next to the largest one, over a grid of their magnitude; unequal ones lose no more."""
    x = torch.linspace(0, 1, 20_001, dtype=torch.float64)[:-1]
    book = torch.tensor(codes, dtype=torch.float64)
    x = torch.cat([x, (book[1:] + book[:-1]) / 2])
    high = torch.searchsorted(book, x, right=True)
    low, up = book[high - 1], book[high]
    error, variance = torch.minimum(x - low, up - x).square(), (x - low) * (up - x)
    most = [float(((d - 1) * each / (1 + (d - 1) * x.square())).max()) for each in (error, variance)]
    assert nearest_loss(codes, d) == pytest.approx(most[0], rel=1e-9, abs=1e-15)
    assert most[1] - 1e-12 <= random_omega(codes, d) <= 1.001 * most[1] + 1e-12 or d > 10**4
    assert random_omega(codes, d) >= most[1] - 1e-12


def test_even_codes_need_no_search():
    x, u = torch.rand(2, 5000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:4] = torch.tensor([0.0, 1.0, 0.25, 0.75])
    for count in (1, 2, 8, 127):
        codes = torch.arange(count + 1, dtype=torch.float64) / count
        assert torch.equal(even_code(x, count), nearest_code(x, codes))
        assert torch.equal(even_code(x, count, u), random_code(x, codes, u))


def test_constants_of_blocks_are_attained():
    g = torch.full((2048,), 1 / 254, dtype=torch.float64)
    g[0] = 1
    lost = float((Block8()(g) - g).square().sum() / g.square().sum())
    assert lost == pytest.approx(2047 / (254**2 + 2047), rel=1e-12)
    assert Block8().contraction(5000) == pytest.approx(1 - lost, rel=1e-12)
    assert Block8().contraction(1) == 1
    assert Block8().constants(5000, zeta2=2.0) == pytest.approx((lost, 2 * lost, 0, 0))
    omega = (math.sqrt(1 + 2047 / 127**2) - 1) / 2
    assert Block8(random=True).constants(5000, workers=4) == pytest.approx((0, 0, omega / 4, 0))
    assert Block8(random=True).contraction(5000) == pytest.approx(1 - omega)
    assert Block8(dynamic=True).contraction(2048) == pytest.approx(1 - nearest_loss(dynamic_codes(), 2048))
    assert Block8(dynamic=True).contraction(2048) > Block8().contraction(2048)


@pytest.mark.parametrize("element_size", [2, 4, 8])
def test_bytes(element_size):
    assert Natural().wire_bytes(17, element_size) == 17 + (9 if element_size == 8 else 3)  # 12 or 9 bits an entry
    assert TernGrad().wire_bytes(17, element_size) == element_size + 4
    assert TernGrad(per_tensor=True).wire_bytes(17, element_size, [7, 10]) == 2 * element_size + 2 + 2
    assert Block8().wire_bytes(5000, element_size) == 3 * element_size + 5000
    assert Block8(4, per_tensor=True).wire_bytes(17, element_size, [7, 10]) == 5 * element_size + 17


def test_without_draws_there_is_no_state():
    for operator in (Natural(nearest=True), Block8()):
        operator(torch.ones(3))
        assert operator.state_dict() == {}
        operator.load_state_dict({})
        with pytest.raises(ValueError, match="carries no state; got 'calls'"):
            operator.load_state_dict({"calls": 3})
    for make in (lambda g: Natural(nearest=True, generator=g), lambda g: Block8(generator=g)):
        with pytest.raises(ValueError, match="without draws: leave out generator="):
            make(torch.Generator())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_large_network(dtype):
    """One draw for each entry, and messages that say what the call does, for a length beyond a block."""
    g = torch.randn(5000, generator=torch.Generator().manual_seed(0)).to(dtype)
    for operator in (Natural(), TernGrad(clip=2.5), Block8(), Block8(random=True)):
        out = operator(g, step=2, workers=[3])
        assert_identical(operator.decode(operator.encode(g, step=2, worker=3), 5000, dtype), out)
        assert bool((out * g >= 0).all())
