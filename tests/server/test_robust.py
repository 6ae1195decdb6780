"""Robust means: closed forms, what moves them and what cannot, and how far from the mean they may be."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from operators import DTYPES
from scipy.optimize import minimize
from torch import Tensor

from metamom.server.aggregate import aggregate
from metamom.server.robust import check_aggregate, geometric_median, robust_mean

HOW = ["mean", "median", "trimmed:0.1", "trimmed:0.25", "trimmed:0.49", "geomedian"]
each_kind = pytest.mark.parametrize("how", HOW)


@st.composite
def rows(draw: st.DrawFn, min_n: int = 1, max_n: int = 9) -> Tensor:
    """``[n, d]``, with points that coincide and points on a line."""
    n, d = draw(st.integers(min_n, max_n)), draw(st.integers(1, 4))
    entry = st.integers(-3, 3).map(float) if draw(st.booleans()) else st.floats(-100, 100)
    values = draw(st.lists(st.lists(entry, min_size=d, max_size=d), min_size=n, max_size=n))
    return torch.tensor(values, dtype=torch.float64)


def spread(x: Tensor) -> float:
    return 1e-300 + float((x - x.mean(0)).norm(dim=1).max())


def sum_of_distances(x: Tensor, y: Tensor) -> float:
    return float((x - y).norm(dim=1).sum())


def test_closed_forms():
    x = torch.tensor([[1.0, -5.0], [2.0, 0.0], [90.0, 7.0], [3.0, 1.0]])
    assert robust_mean(x, "mean").tolist() == [24.0, 0.75]
    assert robust_mean(x, "median").tolist() == [2.5, 0.5]
    assert robust_mean(x[:3], "median").tolist() == [2.0, 0.0]
    assert robust_mean(x, "trimmed:0.25").tolist() == [2.5, 0.5]
    assert robust_mean(x, "trimmed:0.24").tolist() == [24.0, 0.75]  # floor(0.96) workers on each side
    assert robust_mean(torch.arange(10.0).square()[:, None], "trimmed:0.1").item() == pytest.approx(204 / 8)


@pytest.mark.parametrize("k", range(1, 50))
def test_trimmed_share_is_a_decimal(k):
    """0.29 of 100 is 29, whatever 0.29 * 100 is in binary."""
    share = f"0.{k:02d}"
    for n in (25, 50, 100, 200):
        cut = math.floor(Fraction(share) * n)
        x = torch.zeros(n, 1)
        x[:cut] = 1e6
        x[cut] = 1.0
        assert robust_mean(x, f"trimmed:{share}").item() == pytest.approx(1.0 / (n - 2 * cut)), n


@settings(deadline=None, max_examples=50)
@given(x=rows(), share=st.floats(0.01, 0.49))
def test_median_and_trimmed_entry_by_entry(x, share):
    columns = [sorted(column) for column in x.T.tolist()]
    n = len(x)
    median = [(c[(n - 1) // 2] + c[n // 2]) / 2 for c in columns]
    cut = math.floor(share * n)
    trimmed = [math.fsum(c[cut : n - cut]) / (n - 2 * cut) for c in columns]
    assert robust_mean(x, "median").tolist() == pytest.approx(median)
    assert robust_mean(x, f"trimmed:{share}").tolist() == pytest.approx(trimmed, abs=1e-12)


def test_geometric_medians_known_in_closed_form():
    def median(*points: list[float]) -> list[float]:
        return geometric_median(torch.tensor(points, dtype=torch.float64)).tolist()

    assert median([3.0, 4.0]) == [3, 4]
    assert median([1.0], [5.0], [100.0]) == pytest.approx([5.0])
    assert median([0.0, 0.0], [4.0, 0.0], [4.0, 3.0], [0.0, 3.0]) == pytest.approx([2.0, 1.5])  # where diagonals cross
    assert median([0.0, 0.0], [10.0, 0.0], [0.0, 7.0], [1.0, 1.0]) == pytest.approx([1.0, 1.0])  # inside the others
    # Fermat's point of an isosceles triangle sees all sides at 120 degrees; of an angle of 120 or more it is its corner
    assert median([-1.0, 0.0], [1.0, 0.0], [0.0, 5.0]) == pytest.approx([0.0, 1 / math.sqrt(3)], abs=1e-8)
    assert median([-1.0, 0.0], [1.0, 0.0], [0.0, 0.5]) == pytest.approx([0.0, 0.5], abs=1e-12)
    assert median([2.0, 2.0], [2.0, 2.0], [2.0, 2.0], [50.0, -7.0], [9.0, 9.0]) == [2, 2]  # most of them in one point


CREEPS = [
    [0, 0, 0, -7],
    [0, 0, -3, -2],
    [-1, 0, -1, -5],
    [1, -1, -5, -13],
    [1, 0, 0, 0],
    [1, 0, -8, 0],
    [2e-6, 0, -3, 1],
]


@settings(deadline=None, max_examples=60)
@example(x=torch.tensor(CREEPS, dtype=torch.float64))
@example(x=torch.tensor([[0, 0], [0, 0.5], [35, 0], [35, 2]], dtype=torch.float64))
@given(x=rows())
def test_geometric_median_against_brute_force(x):
    ours = geometric_median(x)
    starts = [ours, x.mean(0)]
    found = [
        minimize(lambda y: sum_of_distances(x, torch.from_numpy(y)), s.numpy(), method="Nelder-Mead").fun
        for s in starts
    ]
    best = min([*found, *(sum_of_distances(x, point) for point in x)])
    assert sum_of_distances(x, ours) <= best + 1e-4 * spread(x)


@each_kind
@settings(deadline=None, max_examples=30)
@given(x=rows(), data=st.data())
def test_order_place_and_scale(how, x, data):
    """Which worker is which plays no part; a shift moves the answer by as much, a factor multiplies it."""
    y = robust_mean(x, how)
    # on a line with an even number of points every point between the middle two is a geometric median
    exact = 1e-9 if how != "geomedian" else 1e-4
    tolerance = exact * (spread(x) + 100)
    order = data.draw(st.permutations(range(len(x))))
    shift = torch.tensor(data.draw(st.lists(st.floats(-100, 100), min_size=x.shape[1], max_size=x.shape[1])))
    compare = (
        (lambda a, b, x: abs(sum_of_distances(x, a) - sum_of_distances(x, b)))
        if how == "geomedian"
        else (lambda a, b, x: float((a - b).abs().max()))
    )
    assert compare(robust_mean(x[order], how), y, x) <= tolerance
    assert compare(robust_mean(x + shift, how), y + shift, x + shift) <= tolerance
    assert compare(robust_mean(-3 * x, how), -3 * y, -3 * x) <= 3 * tolerance
    same = x[:1].expand(4, -1)
    torch.testing.assert_close(robust_mean(same, how), x[0], rtol=1e-14, atol=0)


@pytest.mark.parametrize("how", ["median", "trimmed:0.2", "geomedian"])
@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("size", [1e3, 1e6, 1e12, 1e30])
def test_bad_workers_cannot_move_it_far(how, dtype, size):
    """Two of ten: the geometric median stays within 2 (1-e) / (1-2e) radii of the good ones (Minsker, 2015)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(10, 6, generator=generator, dtype=torch.float64).to(dtype)
    good = x[2:].clone()
    radius = float((good - good.mean(0)).norm(dim=1).max())
    for bad in (torch.full((2, 6), size), torch.full((2, 6), -size), torch.tensor([[size], [-size]]).expand(2, 6)):
        x[:2] = bad
        y = robust_mean(x, how)
        assert float((y - good.mean(0)).norm()) <= 2 * 0.8 / 0.6 * radius
        if how != "geomedian":
            assert bool(((y >= good.amin(0)) & (y <= good.amax(0))).all())
        assert float((robust_mean(x, "mean")).norm()) > size / 20 or bool((bad.sum(0) == 0).all())


def test_a_far_worker_pulls_the_geometric_median_by_its_direction_alone():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, 4, generator=generator, dtype=torch.float64)
    found = []
    for size in (1e8, 1e12, 1e150):
        x[0] = size
        found.append(geometric_median(x))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(found[2], found[1], rtol=0, atol=1e-6)


@settings(deadline=None, max_examples=80)
@given(x=rows(), share=st.floats(0.01, 0.49))
def test_how_far_from_the_mean(x, share):
    """||median - mean||^2, ||geomedian - mean||^2 <= zeta^2; ||trimmed - mean||^2 <= delta / (1-delta) zeta^2."""
    mean = x.mean(0)
    zeta2 = float((x - mean).square().sum(1).mean())
    delta = 2 * math.floor(share * len(x)) / len(x)
    slack = 1e-9 * (1e-20 + spread(x) ** 2)
    for how, factor in (("median", 1.0), ("geomedian", 1.0), (f"trimmed:{share}", delta / (1 - delta))):
        assert float((robust_mean(x, how) - mean).square().sum()) <= factor * zeta2 * (1 + 1e-6) + slack, how


def test_the_bounds_are_met():
    """Half of the workers and one more at 0, the others at 1; and the trimmed one's, by its equality case."""
    for n in (101, 1001):
        x = torch.zeros(n, 1, dtype=torch.float64)
        x[: n // 2] = 1.0
        zeta2 = float((x - x.mean()).square().mean())
        for how in ("median", "geomedian"):
            assert float((robust_mean(x, how) - x.mean()).square()) > 0.95 * zeta2
    x = torch.zeros(100, 1, dtype=torch.float64)
    x[:20] = 1.0
    zeta2 = float((x - x.mean()).square().mean())
    bias2 = float((robust_mean(x, "trimmed:0.2") - x.mean()).square())
    assert bias2 == pytest.approx(0.25 * zeta2)  # 0.04 of 0.16; the bound is 0.4/0.6


@each_kind
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_come_back(how, dtype):
    x = torch.randn(12, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = robust_mean(x.to(dtype), how)
    assert y.dtype is dtype
    torch.testing.assert_close(y.double(), robust_mean(x, how), rtol=0, atol=max(1e-5, 8 * torch.finfo(dtype).eps))


@each_kind
def test_one_worker_and_two(how):
    x = torch.tensor([[1.0, -2.0], [3.0, 5.0]], dtype=torch.float64)
    assert robust_mean(x[:1], how).tolist() == [1.0, -2.0]
    y = robust_mean(x, how)
    assert sum_of_distances(x, y) == pytest.approx(float((x[0] - x[1]).norm()))  # between them
    if how != "geomedian":
        assert y.tolist() == [2.0, 1.5]
    assert robust_mean(torch.zeros(5, 3), how).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    "how",
    ["", "Mean", "mode", "mean:0.1", "median:", "trimmed", "trimmed:", "trimmed:0", "trimmed:0.5", "trimmed:-0.1",
     "trimmed:nan", "trimmed:x", "trimmed:10%", "geomedian:3", "trimmed:0_1e-1", "trimmed:.١",
     "trimmed:0.1\u2028", "trimmed:" + "1" * 10**5],
)  # fmt: skip
def test_bad_spellings(how):
    for refuse in (check_aggregate, lambda how: robust_mean(torch.ones(3, 2), how)):
        with pytest.raises(ValueError, match=r"mean, median, geomedian or trimmed:SHARE with 0 < SHARE < 0\.5; got"):
            refuse(how)


def test_a_share_that_trims_off_nobody_is_refused_wherever_gradients_are_aggregated():
    with pytest.raises(ValueError, match=r"trimmed:0\.1 of 4 workers leaves out none of them and is the mean"):
        aggregate(torch.zeros(4, 2), None, "trimmed:0.1")
