"""MLMC compression: its mean and second moment, counted out over every level, and its messages."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operators import gradients
from torch import Tensor

from metamom import MLMCQSGD, MLMCTopK, Sign, TopK
from metamom.bias.multilevel import adaptive, draw_level, geometric, second_moment
from metamom.bias.multilevel_qsgd import bit_levels
from metamom.bias.multilevel_topk import top_k_levels

WIDE = torch.tensor([0.3, -2.0, 1.1, 0.0, 0.7, -0.2], dtype=torch.float64)
HAND = torch.tensor([3.0, -1.0, 2.0, 0.5], dtype=torch.float64)
RATIOS = [None, 1.0, 0.5]


def chances(operator: MLMCTopK | MLMCQSGD, differences: Tensor) -> Tensor:
    norms = differences.norm(dim=1)
    if operator.geometric is None:
        return norms / norms.sum()
    powers = torch.tensor([operator.geometric**level for level in range(len(norms))], dtype=torch.float64)
    return powers / powers.sum()


def top_k_differences(g: Tensor, k: int) -> Tensor:
    """By the definition: differences of Top-K operators, the last of which keeps everything."""
    ladder = [torch.zeros_like(g), *(TopK(min(m, len(g)))(g) for m in range(k, len(g) + k, k))]
    return torch.stack([above - below for below, above in itertools.pairwise(ladder)])


def bit_differences(g: Tensor, up: Tensor, bits: int) -> Tensor:
    """By the definition: bits of |g| / max|g|, of which the largest has all, and the rounding ``up [d]`` or not."""
    scale = g.abs().max()
    ladder = [torch.zeros_like(g)]
    for level in range(1, bits + 1):
        ladder.append(g.sign() * scale * (g.abs() / scale * 2**level).floor().clamp_max(2**level - 1) / 2**level)
    ladder.append(ladder[-1] + g.sign() * scale * up.double() / 2**bits)
    return torch.stack([above - below for below, above in itertools.pairwise(ladder)])


def counted(operator: MLMCTopK | MLMCQSGD, g: Tensor, monkeypatch, uniforms: Tensor) -> Tensor:
    """The images of g under numbers ``[m, count]`` in place of the draws."""
    monkeypatch.setattr(type(operator), "_uniform", lambda self, at, rows, count: uniforms)
    return operator(g.expand(len(uniforms), -1), step=0)


def test_by_hand():
    """Levels {3, 2} and {-1, 0.5}: norms sqrt(13) and sqrt(1.25)."""
    order, norms = top_k_levels(HAND, 2)
    assert order.tolist() == [0, 2, 1, 3]
    assert (3 * norms).tolist() == pytest.approx([math.sqrt(13), math.sqrt(1.25)])
    p = math.sqrt(13) / (math.sqrt(13) + math.sqrt(1.25))
    small, large = sorted({tuple(MLMCTopK(2)(HAND, step=step).tolist()) for step in range(40)})
    assert small == pytest.approx((0, -1 / (1 - p), 0, 0.5 / (1 - p)))
    assert large == pytest.approx((3 / p, 0, 2 / p, 0))


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("k", [1, 2, 4, 6])
def test_top_k_over_all_levels(k, ratio, monkeypatch):
    """E C(g) = g, and E ||C(g)||^2 = (sum_l ||D_l||)^2 with adaptive probabilities, sum_l ||D_l||^2/p_l in general."""
    operator, differences = MLMCTopK(k, geometric=ratio), top_k_differences(WIDE, k)
    p = chances(operator, differences)
    sent = p > 0
    middle = (p.cumsum(0) - p / 2)[sent]  # a number that draws each level
    out = counted(operator, WIDE, monkeypatch, middle.unsqueeze(1))
    torch.testing.assert_close(out, differences[sent] / p[sent].unsqueeze(1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close((p[sent].unsqueeze(1) * out).sum(0), WIDE, rtol=1e-12, atol=1e-12)
    square = float((p[sent] * out.square().sum(1)).sum())
    assert square == pytest.approx(second_moment(differences.norm(dim=1), p), rel=1e-12)
    if ratio is None:
        assert square == pytest.approx(float(differences.norm(dim=1).sum()) ** 2, rel=1e-12)
    assert square - float(WIDE.square().sum()) <= operator.constants(6).M * float(WIDE.square().sum()) + 1e-12


def test_one_entry_a_level_is_importance_sampling(monkeypatch):
    """Entry j with probability |g_j| / ||g||_1, which arrives as sign(g_j) ||g||_1."""
    magnitude = HAND.abs()
    _, norms = top_k_levels(HAND, 1)
    torch.testing.assert_close(adaptive(norms), (magnitude / magnitude.sum()).sort(descending=True).values)
    for j, place in ((0, 0.1), (2, 0.6), (1, 0.8), (3, 0.97)):  # cumulated: 6/13, 10/13, 12/13, 1
        (out,) = counted(MLMCTopK(1), HAND, monkeypatch, torch.tensor([[place]], dtype=torch.float64))
        expected = torch.zeros(4, dtype=torch.float64)
        expected[j] = HAND[j].sign() * 6.5
        torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("bits", [1, 2, 3])
def test_bits_over_all_levels_and_roundings(bits, ratio, monkeypatch):
    operator, g = MLMCQSGD(bits, geometric=ratio), WIDE[:4]
    phi = g.abs() / 2 * 2**bits
    phi = phi - phi.floor().clamp_max(2**bits - 1)  # 1 for the largest, which always rounds up
    mean, square = torch.zeros(4, dtype=torch.float64), 0.0
    for up in itertools.product([False, True], repeat=4):
        rounded = torch.tensor(up)
        chance = float(torch.where(rounded, phi, 1 - phi).prod())
        if chance == 0:
            continue
        differences = bit_differences(g, rounded, bits)
        p = chances(operator, differences)
        sent = p > 0
        uniform = torch.where(rounded, (phi - 1e-9).clamp_min(0), (phi + 1e-9).clamp_max(1 - 1e-12))
        middle = (p.cumsum(0) - p / 2)[sent]
        out = counted(
            operator, g, monkeypatch, torch.cat([middle.unsqueeze(1), uniform.expand(len(middle), -1)], dim=1)
        )
        torch.testing.assert_close(out, differences[sent] / p[sent].unsqueeze(1), rtol=1e-12, atol=1e-12)
        mean += chance * (p[sent].unsqueeze(1) * out).sum(0)
        moment = float((p[sent] * out.square().sum(1)).sum())
        if ratio is None:
            assert moment == pytest.approx(float(differences.norm(dim=1).sum()) ** 2, rel=1e-12)
        square += chance * moment
    torch.testing.assert_close(mean, g, rtol=1e-12, atol=1e-12)
    assert square - float(g.square().sum()) <= operator.constants(4).M * float(g.square().sum())


@settings(deadline=None, max_examples=30)
@given(g=gradients(min_d=1), bits=st.integers(1, 12))
def test_bits_add_up_to_the_rounding(g, bits):
    for row in g.double().reshape(-1, g.shape[-1]):
        uniform = torch.linspace(0, 1 - 1e-9, len(row), dtype=torch.float64)
        digits, units, scale = bit_levels(row, uniform, bits)
        whole = scale * (units.unsqueeze(1) * digits).sum(0)
        assert bool(((whole - row).abs() <= scale / 2**bits * (1 + 1e-9)).all())
        assert bool((whole * row >= 0).all())
        largest = row.abs() == scale
        torch.testing.assert_close(whole[largest], row[largest])


@pytest.mark.parametrize("ratio", RATIOS)
@settings(deadline=None, max_examples=30)
@given(g=gradients(min_d=1), data=st.data())
def test_second_moments_are_within_the_constants(ratio, g, data):
    g = g.double().reshape(-1, g.shape[-1])
    d = g.shape[-1]
    operator = MLMCTopK(data.draw(st.integers(1, d)), geometric=ratio)
    for row in g:
        square, norms = float(row.square().sum()), float(row.abs().max()) * top_k_levels(row, operator.k)[1]
        p = adaptive(norms) if ratio is None else geometric(ratio, len(norms))
        assert second_moment(norms, p) <= (1 + operator.constants(d).M) * square * (1 + 1e-9) + 1e-12


def test_constants_by_hand():
    """Equal magnitudes meet Top-K's bound; levels of 2, 2 and 1 entries."""
    equal = torch.ones(5, dtype=torch.float64)
    for ratio, omega in (
        (None, (2 * math.sqrt(2) + 1) ** 2 / 5 - 1),
        (1.0, 2.0),
        (0.5, (2 * 7 / 4 + 2 * 7 / 2 + 7) / 5 - 1),
    ):
        operator = MLMCTopK(2, geometric=ratio)
        assert operator.constants(5, workers=2, zeta2=3.0) == pytest.approx((0, 0, omega / 2, 3 * omega / 2))
        norms = top_k_levels(equal, 2)[1]
        p = adaptive(norms) if ratio is None else geometric(ratio, 3)
        assert second_moment(norms, p) == pytest.approx(5 * (1 + omega))
    assert MLMCTopK(5).constants(5).M < 1e-15
    assert abs(MLMCTopK(1).constants(5).M - 4) < 1e-12  # as Rand-K times d/K
    assert MLMCTopK(3).contraction(4) == pytest.approx(1 - ((math.sqrt(3) + 1) ** 2 / 4 - 1))
    assert MLMCTopK(1).contraction(5) is None
    assert MLMCQSGD(8).constants(1).M < 1e-15
    # sqrt(4) = 2: 1 + 1/2, and sqrt(min(4/16, 2/4)) = 1/2 of the rounding
    assert abs(MLMCQSGD(2).constants(4).M - 3) < 1e-12


def test_levels_are_drawn_by_their_probabilities():
    p = torch.tensor([0.0, 0.25, 0.0, 0.75, 0.0])
    assert [draw_level(p, u) for u in (0.0, 0.2499, 0.25, 0.9, 1 - 2**-53)] == [1, 1, 3, 3, 3]
    out = MLMCTopK(1)(HAND.expand(4000, -1), step=0)
    kept = (out != 0).double().mean(0)
    expected = HAND.abs() / 6.5
    assert bool(((kept - expected).abs() <= 5 * (expected * (1 - expected) / 4000).sqrt()).all())


@pytest.mark.parametrize("element_size", [2, 4, 8])
def test_bytes_written_out(element_size):
    """Level and probability are in the values: as many bytes as Top-K, and as the sign in 32 bits."""
    size = element_size
    assert MLMCTopK(3).wire_bytes(10, size) == TopK(3).wire_bytes(10, size) == 3 * (size + 4)
    assert MLMCTopK(ratio=0.5, per_tensor=True).wire_bytes(10, size, [4, 6]) == 5 * (size + 4)
    assert MLMCQSGD().wire_bytes(11, size) == max(4, size) + 3
    assert MLMCQSGD().wire_bytes(11) == Sign().wire_bytes(11)
    assert MLMCQSGD(20, per_tensor=True).wire_bytes(11, size, [5, 6]) == 2 * max(4, size) + 1 + 2


def test_a_probability_that_float64_does_not_hold():
    with pytest.raises(ValueError, match=r"geometric=0\.5 gives the last of 2000 levels the probability 0"):
        MLMCTopK(1, geometric=0.5)(torch.ones(2000))
    with pytest.raises(ValueError, match="1 <= k <= 4"):
        MLMCTopK(5)(HAND)


@pytest.mark.parametrize("ratio", [0.0, -1.0, 1.5, math.nan])
def test_bad_ratios(ratio):
    for make in (lambda: MLMCTopK(1, geometric=ratio), lambda: MLMCQSGD(geometric=ratio)):
        with pytest.raises(ValueError, match="0 < geometric <= 1, or None for adaptive ones; got"):
            make()


@pytest.mark.parametrize("bits", [0, 31, 2.0, True])
def test_bad_bits(bits):
    with pytest.raises(ValueError, match="1 <= bits <= 30; got"):
        MLMCQSGD(bits)
