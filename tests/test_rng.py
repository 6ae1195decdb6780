"""Random numbers by counter: exact values, a slow twin, independence, uniform choices."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metamom.rng import DrawCoordinates, Purpose, choose, normals, subset, uniforms
from metamom.tasks.checks import check_count, check_seed, check_step

WORD = 2**64 - 1


def at(*indices: int, stream: str = "train", step: int = 0) -> DrawCoordinates:
    return DrawCoordinates(stream, step, np.array(indices, dtype=np.int64))


def philox_4x64(key: tuple[int, int], counter: list[int]) -> list[int]:
    """Ten rounds of Philox-4x64 in Python's integers, with the constants of Salmon et al. (2011)."""
    x, (k0, k1) = list(counter), key
    for _ in range(10):
        a, b = x[0] * 0xD2E7470EE14C6C93, x[2] * 0xCA5A826395121157
        x = [(b >> 64) ^ x[1] ^ k0, b & WORD, (a >> 64) ^ x[3] ^ k1, a & WORD]
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & WORD, (k1 + 0xBB67AE8584CAA73B) & WORD
    return x


@given(
    seed=st.integers(0, WORD),
    stream=st.text(max_size=8),
    step=st.integers(0, WORD),
    index=st.integers(0, 2**63 - 1),
    purpose=st.sampled_from(Purpose),
    count=st.integers(1, 10),
)
def test_uniforms_equal_philox_in_python_integers(seed, stream, step, index, purpose, count):
    key = (seed, int.from_bytes(hashlib.sha256(stream.encode()).digest()[:8], "little"))
    # NumPy counts up before each block of four.
    words = [w for n in range(1, 4) for w in philox_4x64(key, [n, index, step, int(purpose)])]
    drawn = uniforms(seed, at(index, stream=stream, step=step), purpose, count)
    assert drawn.tolist() == [[(w >> 11) * 2.0**-53 for w in words[:count]]]


def test_the_numbers_of_every_platform():
    first = uniforms(0, at(0, 1), Purpose.TASK, 2)
    assert [x.hex() for x in first.ravel().tolist()] == [
        "0x1.9e0bac5981bf4p-3",
        "0x1.9cac6a3dcf094p-1",
        "0x1.838419e2f1998p-1",
        "0x1.093e3cb2d91f1p-1",
    ]
    last = uniforms(2**64 - 1, at(31, stream="test", step=10**6), Purpose.DATA, 2)
    assert [x.hex() for x in last.ravel().tolist()] == ["0x1.37e72010d393dp-1", "0x1.7447d14c6ea26p-2"]
    assert choose(uniforms(0, at(0, 1), Purpose.TASK, 5), 4400).tolist() == [
        [889, 3546, 1997, 1322, 786],
        [3330, 2279, 2651, 1212, 1333],
    ]
    many = uniforms(7, at(*range(32), stream="validation", step=3), Purpose.DATA, 80)
    assert (
        hashlib.sha256(many.astype("<f8").tobytes()).hexdigest()
        == "8796e801ea0b3c747df581d85312066527c67b726a53378f6491cc1eb695e5d8"
    )


def test_no_two_places_share_numbers():
    seen = set()
    # Seeds that differ in their lowest bit only, above what float64 can tell apart, are different seeds.
    for seed in (0, 1, 2**53, 2**53 + 1, 2**64 - 2, 2**64 - 1):
        for stream in ("train", "validation", "test"):
            for step in (0, 1, 2):
                for purpose in Purpose:
                    seen.update(uniforms(seed, at(0, 1, 2, stream=stream, step=step), purpose, 3).ravel().tolist())
    assert len(seen) == 6 * 3 * 3 * len(Purpose) * 3 * 3


def test_more_numbers_begin_with_fewer():
    np.testing.assert_array_equal(
        uniforms(3, at(4), Purpose.DATA, 17)[:, :5], uniforms(3, at(4), Purpose.DATA, 5), strict=True
    )


def slow_choose(u: list[float], n: int) -> list[int]:
    pool = list(range(n))
    for j, x in enumerate(u):
        other = j + int(x * (n - j))
        pool[j], pool[other] = pool[other], pool[j]
    return pool[: len(u)]


@given(st.data())
def test_choose_equals_the_textbook_shuffle(data):
    k = data.draw(st.integers(1, 6))
    sizes = data.draw(st.lists(st.integers(k, 300), min_size=1, max_size=4))
    u = np.array(data.draw(st.lists(st.lists(st.floats(0, 1, exclude_max=True), min_size=k, max_size=k),
                                    min_size=len(sizes), max_size=len(sizes))))  # fmt: skip
    chosen = choose(u, np.array(sizes))
    assert chosen.tolist() == [slow_choose(row, n) for row, n in zip(u.tolist(), sizes, strict=True)]
    assert all(len(set(row)) == k for row in chosen.tolist())


def test_choose_stays_in_range_at_the_largest_number_below_one():
    u = np.full((1, 3), 1 - 2.0**-53)
    for n in (3, 5, 7, 1000, 2**40 + 1):
        assert choose(u, n).max() == n - 1


def test_choices_are_uniform():
    """Chi-square over the 12 ordered pairs from 4, and over the first of 100 (the pool that holds few places)."""
    rows = 12_000
    u = uniforms(0, at(*range(rows)), Purpose.CHOICE, 2)
    pairs = Counter(map(tuple, choose(u, 4).tolist()))
    assert len(pairs) == 12
    assert sum((c - rows / 12) ** 2 / (rows / 12) for c in pairs.values()) < 31.3  # 99.9 % point, 11 degrees
    for column in choose(u, 100).T:
        counts = np.bincount(column, minlength=100)
        assert ((counts - rows / 100) ** 2 / (rows / 100)).sum() < 148.3  # 99.9 % point, 99 degrees


@given(seed=st.integers(0, WORD), step=st.integers(0, WORD), n=st.integers(1, 300), data=st.data())
def test_subset_is_a_set_of_k(seed, step, n, data):
    """Also beyond the half, where those left over are taken, and at k = n; each place by itself."""
    k = data.draw(st.integers(1, n))
    places = at(5, 0, 9, step=step)
    rows = subset(seed, places, Purpose.BIAS, k, n)
    assert rows.shape == (3, k)
    assert rows.dtype == np.int64
    for row, index in zip(rows, places.indices.tolist(), strict=True):
        assert len(set(row.tolist())) == k
        assert 0 <= row.min() <= row.max() < n
        np.testing.assert_array_equal(row, subset(seed, at(index, step=step), Purpose.BIAS, k, n)[0])


@given(n=st.integers(2, 100), data=st.data())
def test_subset_is_the_first_different_draws(n, data):
    """A slow twin: one draw after the other, those that came before passed over."""
    k = data.draw(st.integers(1, n))
    few: list[int] = []
    for x in uniforms(3, at(7), Purpose.BIAS, 10_000)[0]:
        if len(few) < min(k, n - k) and int(x * n) not in few:
            few.append(int(x * n))
    expected = few if k <= n // 2 else [i for i in range(n) if i not in few]
    assert subset(3, at(7), Purpose.BIAS, k, n).tolist() == [expected]


@pytest.mark.parametrize(("k", "n"), [(1, 5), (2, 5), (3, 5), (4, 5), (3, 6), (5, 10)])
def test_all_subsets_are_equally_likely(k, n):
    draws = 4000
    rows = subset(1, at(*range(draws)), Purpose.BIAS, k, n)
    counts = Counter(tuple(sorted(row)) for row in rows.tolist())
    every = list(itertools.combinations(range(n), k))
    mean = draws / len(every)
    chi2 = sum((counts[each] - mean) ** 2 / mean for each in every)
    assert chi2 < len(every) - 1 + 5 * np.sqrt(2 * (len(every) - 1))
    assert set(counts) <= set(every)


def test_subsets_of_millions():
    """For which `choose` would take hours; and the same on every platform."""
    rows = subset(0, at(0, 1), Purpose.BIAS, 6_697, 669_706)
    assert [len(set(row)) for row in rows.tolist()] == [6_697] * 2
    assert abs(rows.mean() / 669_706 - 0.5) < 5 / np.sqrt(12 * rows.size)
    assert rows[:, :3].tolist() == [[616257, 479102, 89575], [77462, 132883, 58083]]
    most = subset(0, at(0), Purpose.BIAS, 669_000, 669_706)[0]
    assert len(set(most.tolist())) == 669_000


def test_normals_have_the_moments_of_a_normal():
    z = normals(uniforms(0, at(*range(2000)), Purpose.DATA, 20))
    assert z.shape == (2000, 20)
    n = z.size
    assert abs(z.mean()) < 4 / np.sqrt(n)
    assert abs((z**2).mean() - 1) < 4 * np.sqrt(2 / n)
    assert abs((z[:, :10] * z[:, 10:]).mean()) < 4 / np.sqrt(n / 2)  # cosine and sine parts are uncorrelated


@pytest.mark.parametrize("bad", [1.0, "0", True, None])
def test_a_seed_or_count_that_is_no_integer(bad):
    with pytest.raises(TypeError, match="seed must be an integer"):
        check_seed(bad)
    with pytest.raises(TypeError, match="shots must be an integer"):
        check_count("shots", bad)


def test_arguments_out_of_range():
    for seed in (-1, 2**64):
        with pytest.raises(ValueError, match="0 <= seed < 2"):
            check_seed(seed)
    for step in (-1, 2**64):
        with pytest.raises(ValueError, match="0 <= step < 2"):
            check_step(step)
    with pytest.raises(ValueError, match="ways must be >= 1; got 0"):
        check_count("ways", 0)
    assert check_seed(np.int64(3)) == 3
