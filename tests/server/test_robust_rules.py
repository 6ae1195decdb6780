"""Each robust mean and attack by itself: small examples by hand, enumeration, plain loops."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from statistics import NormalDist

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from robust_means import crowds, slack, spread2, vectors
from torch import Tensor

from metamom.server.attacks import alie_z, parse_attack
from metamom.server.robust import Memory, RobustMean, parse_rule, robust_mean
from metamom.server.rules.centred_clip import centred_clip
from metamom.server.rules.distances import pairwise
from metamom.server.rules.krum import krum_scores
from metamom.server.rules.mixing import Bucketing, NearestNeighbours, shuffled


def column(*entries: float) -> Tensor:
    return torch.tensor(entries, dtype=torch.float64)[:, None]


def scores_by_subsets(x: Tensor, faulty: int) -> list[float]:
    """For each vector, the least sum of squared distances to n - F - 2 others, over all sets of these."""
    n = len(x)
    return [
        min(
            math.fsum(float((x[i] - x[j]).square().sum()) for j in others)
            for others in itertools.combinations([j for j in range(n) if j != i], n - faulty - 2)
        )
        for i in range(n)
    ]


def test_krum_by_hand():
    """Of 0, 1, 3, 4, 50 with F = 1, the two nearest others: 1 + 9, 1 + 4, 1 + 4, 1 + 9, and far."""
    x = column(0, 1, 3, 4, 50)
    scores = krum_scores(x, 1)
    assert (scores[:4] / scores[1]).tolist() == pytest.approx([2, 1, 1, 2])
    assert robust_mean(x, "krum:1").item() == 1  # the first of two equal ones
    assert robust_mean(x, "multi-krum:1:2").item() == 2
    assert robust_mean(x, "multi-krum:1:3").item() == pytest.approx(4 / 3)  # 0 and 4 are equal
    assert robust_mean(x, "multi-krum:1").item() == 2


@settings(deadline=None, max_examples=30)
@given(x=crowds(5, 7), data=st.data())
def test_krum_by_enumeration(x, data):
    faulty = data.draw(st.integers(1, (len(x) - 3) // 2))
    brute = scores_by_subsets(x, faulty)
    y = robust_mean(x, f"krum:{faulty}")
    taken = [brute[i] for i in range(len(x)) if torch.equal(x[i], y)]
    assert min(taken) <= min(brute) + slack(x)
    chosen = data.draw(st.integers(1, len(x) - faulty))
    best = sorted(range(len(x)), key=lambda i: brute[i])
    if chosen < len(x) and brute[best[chosen]] > brute[best[chosen - 1]] + slack(x):  # no tie at the end
        expected = x[best[:chosen]].mean(0)
        torch.testing.assert_close(robust_mean(x, f"multi-krum:{faulty}:{chosen}"), expected, rtol=1e-12, atol=1e-12)


@settings(deadline=None, max_examples=30)
@given(x=crowds(), data=st.data())
def test_mixing_by_enumeration(x, data):
    """The n - F nearest are the set with the least sum of distances; mixing draws towards each honest mean."""
    n = len(x)
    faulty = data.draw(st.integers(1, (n - 1) // 2))
    mixed = NearestNeighbours(faulty).mix(x)
    for i in range(n):
        sums = {
            held: math.fsum(float((x[i] - x[j]).norm()) for j in held)
            for held in itertools.combinations(range(n), n - faulty)
        }
        least = min(sums.values())
        nearest = [x[list(held)].mean(0) for held, total in sums.items() if total <= least + slack(x)]
        assert min(float((mixed[i] - each).abs().max()) for each in nearest) <= slack(x)
    for held in itertools.combinations(range(n), n - faulty):
        some, center = mixed[list(held)], x[list(held)].mean(0)
        after = float((some - center).square().sum(1).mean())
        assert after <= 8 * faulty / (n - faulty) * spread2(x[list(held)]) + slack(x)


def test_mixing_by_hand():
    x = column(0, 1, 2, 30)
    assert NearestNeighbours(1).mix(x).flatten().tolist() == pytest.approx([1, 1, 1, 11])
    assert robust_mean(x, "nnm:1>median").item() == 1
    assert pairwise(column(0, 3, -1)).tolist() == [[0, 3, 1], [3, 0, 4], [1, 4, 0]]


def test_distances_of_huge_vectors():
    x = torch.tensor([[1.5e308], [-1.5e308], [0.0]], dtype=torch.float64)
    assert pairwise(x)[0].tolist() == [0, math.inf, 1.5e308]
    assert pairwise(torch.tensor([[3e38], [-3e38]]))[0, 1].item() > 3e38


def clipped_in_a_loop(x: Tensor, start: list[float], radius: float, iterations: int) -> list[float]:
    center = list(start)
    for _ in range(iterations):
        step = [0.0] * len(center)
        for row in x.tolist():
            away = [a - c for a, c in zip(row, center, strict=True)]
            norm = math.sqrt(math.fsum(a * a for a in away))
            factor = 1.0 if norm <= radius else radius / norm
            step = [s + factor * a / len(x) for s, a in zip(step, away, strict=True)]
        center = [c + s for c, s in zip(center, step, strict=True)]
    return center


@settings(deadline=None, max_examples=40)
@given(x=crowds(1, 7), radius=st.floats(0.01, 100), iterations=st.integers(1, 4))
def test_centred_clipping_in_a_loop(x, radius, iterations):
    start = x[0] - 1
    ours = centred_clip(x, start, radius, iterations)
    expected = clipped_in_a_loop(x, start.tolist(), radius, iterations)
    assert ours.tolist() == pytest.approx(expected, rel=1e-10, abs=1e-10 * (1 + float(x.abs().max())))
    assert float((ours - start).norm()) <= iterations * radius * (1 + 1e-9)


def test_centred_clipping_by_hand():
    x = column(0, 2, 4, 100)
    three, zero = column(3)[0], column(0)[0]
    assert centred_clip(x, three, 1.0).item() == 3  # -1 - 1 + 1 + 1
    assert centred_clip(x, three, 5.0).item() == pytest.approx(3 + (-3 - 1 + 1 + 5) / 4)
    assert centred_clip(x, zero, 1e9).item() == 26.5  # all inside: the mean
    assert robust_mean(x, "centred-clip:1").item() == 3  # from the median


@settings(deadline=None, max_examples=30)
@given(x=crowds(4, 8), faulty=st.integers(1, 3), radius=st.floats(0.1, 10), iterations=st.integers(1, 3))
def test_faulty_vectors_move_centred_clipping_by_their_share_of_the_radius(x, faulty, radius, iterations):
    """One iteration, from the same start, by at most 2 F/n radius: each of them adds radius/n at most."""
    other = x.clone()
    other[len(x) - faulty :] = 1e6
    start = x.mean(0)
    moved = centred_clip(x, start, radius) - centred_clip(other, start, radius)
    assert float(moved.norm()) <= 2 * faulty / len(x) * radius * (1 + 1e-9) + 1e-12


def test_centred_clipping_starts_from_the_last_aggregate():
    robust, before = RobustMean("centred-clip:0.5:iterations=2"), None
    for seed in range(4):
        x = vectors(seed=seed)
        start = x.median(0).values if before is None else before  # of nine
        before = torch.tensor(clipped_in_a_loop(x, start.tolist(), 0.5, 2), dtype=torch.float64)
        total = robust.combine(x)
        torch.testing.assert_close(total, before, rtol=1e-12, atol=1e-12)
        robust.commit(total)
    assert torch.equal(robust.memory.previous, total)
    robust.commit(torch.full((5,), math.nan, dtype=torch.float64))  # of a step that is skipped
    assert torch.equal(robust.memory.previous, total)


def test_a_huge_radius_makes_clipping_the_mean_and_mixing_nothing_else():
    x = vectors()
    torch.testing.assert_close(robust_mean(x, "centred-clip:1e6"), x.mean(0))
    torch.testing.assert_close(robust_mean(x, "bucketing:3>mean"), x.mean(0))  # 3 divides 9


def test_buckets_are_a_partition_and_equally_likely():
    """Every pair of four vectors meets in a third of the steps; the last bucket of nine in fours has one."""
    pairs = Counter()
    for step in range(600):
        order = shuffled(0, step, 4).tolist()
        assert sorted(order) == [0, 1, 2, 3]
        pairs[frozenset(order[:2])] += 1
        pairs[frozenset(order[2:])] += 1
    assert len(pairs) == 6
    assert all(abs(count / 600 - 1 / 3) < 4 * math.sqrt(2 / 9 / 600) for count in pairs.values())
    x = torch.eye(9, dtype=torch.float64)
    for step in range(3):
        mixed = Bucketing(4).mix(x, Memory(step))
        assert sorted((mixed > 0).sum(1).tolist()) == [1, 4, 4]
        assert mixed.sum(1).tolist() == pytest.approx([1, 1, 1])
        assert ((mixed > 0).sum(0) == 1).all()
    drawn = [Bucketing(4, seed).mix(x, Memory(step)) for seed in (0, 1) for step in (0, 1)]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(drawn, 2))


def test_bucketing_hands_on_the_number_of_buckets():
    assert parse_rule("bucketing:2>krum:1").check(9) is None
    with pytest.raises(ValueError, match=r"bucketing:2 leaves 4 vectors of 8 workers: krum:1 \(2 F \+ 3\) needs at"):
        parse_rule("bucketing:2>krum:1").check(8)
    with pytest.raises(ValueError, match="leaves one bucket, which is the mean"):
        parse_rule("bucketing:9>median").check(9)


def test_attacks_by_hand():
    x = torch.tensor([[1.0, 0.0], [3.0, 4.0], [7.0, 7.0], [0.0, 9.0]], dtype=torch.float64)
    assert parse_attack("sign-flip:2")(x)[2:].tolist() == [[-7, -7], [0, -9]]
    assert parse_attack("ipm:2:eps=0.5")(x)[2:].tolist() == [[-1, -1]] * 2
    assert parse_attack("alie:2:z=1.5")(x)[2:].tolist() == [[2 - 1.5, 2 - 3.0]] * 2  # deviations 1 and 2
    assert parse_attack("mimic:2:worker=1")(x)[2:].tolist() == [[3, 4]] * 2
    drawn = parse_attack("gaussian:2:std=3")(x.expand(4, 2).repeat(1, 2000), step=5)[2:]
    assert float(drawn.std()) == pytest.approx(3, rel=0.05)
    assert abs(float((drawn[0] * drawn[1]).mean())) < 0.5  # independent, variance 81


@pytest.mark.parametrize(("n", "faulty", "supporters"), [(50, 24, 2), (50, 12, 14), (10, 2, 4), (5, 1, 2), (9, 3, 2)])
def test_the_z_of_alie(n, faulty, supporters):
    """s honest workers further out and the F faulty ones are a majority."""
    assert faulty + supporters == n // 2 + 1
    z = alie_z(n, faulty)
    assert NormalDist().cdf(z) == pytest.approx((n - faulty - supporters) / (n - faulty))
    x = vectors(n, 3)
    expected = x[: n - faulty].mean(0) - z * x[: n - faulty].std(0, correction=0)
    torch.testing.assert_close(parse_attack(f"alie:{faulty}")(x)[-1], expected)


def test_the_z_of_alie_at_its_ends():
    assert alie_z(4, 3) == alie_z(3, 2) == 0  # a majority by itself
    assert alie_z(3, 1) == 0  # Phi(0) = 1/2
    assert alie_z(2, 1) == 0  # s would be all
    assert alie_z(4, 1) == 0  # Phi(z) = 1/3
    assert alie_z(5, 1) == alie_z(10, 2) == 0  # Phi(z) = 1/2


def test_inner_products_turn_the_mean_around_and_not_the_median():
    x = vectors(9) + 5
    strong = parse_attack("ipm:2:eps=4")(x)  # (n - F)/F = 3.5
    honest = x[:7].mean(0)
    assert float(strong.mean(0) @ honest) < 0
    for how in ("median", "krum:2", "nnm:2>geomedian"):
        assert float(robust_mean(strong, how) @ honest) > 0
