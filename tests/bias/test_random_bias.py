"""Rand-K and QSGD: what they draw by, and their mean and variance: exact where every outcome can be counted."""

from __future__ import annotations

import io
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operators import RANDOM, assert_identical, cut, each, gradients

from metamom import QSGD, Clip, Compose, RandK, TopK
from metamom.bias import EF21, NonFiniteError
from metamom.bias.random import quantize, rand_k

DRAWS = 6_000
WIDE = torch.tensor([0.3, -2.0, 1.1, 0.0, 0.7, -0.2], dtype=torch.float64)


def sample(operator, g, draws: int = DRAWS):
    """``[draws, d]``: the images of one gradient at so many workers."""
    return operator(g.expand(draws, -1), step=0)


def assert_mean(samples, expected) -> None:
    """Within five standard errors of each entry."""
    error = samples.std(0) / math.sqrt(len(samples)) + 1e-12
    assert bool(((samples.mean(0) - expected).abs() <= 5 * error).all()), (samples.mean(0) - expected) / error


# what they draw by


@each(RANDOM)
@settings(deadline=None, max_examples=6)
@given(g=gradients(rows=3), first=st.integers(0, 10**6), step=st.integers(0, 2**63))
def test_workers_at_once_or_one_by_one_in_any_order(operator, g, first, step):
    sizes = cut(g.shape[-1])
    rows = {i: operator(g[i], step=step, workers=[first + i], sizes=sizes) for i in (2, 0, 1)}
    # Clip's norms may be summed in another order in a batch
    out = operator(g, step=step, workers=range(first, first + 3), sizes=sizes)
    if operator.spec.startswith("clip"):
        g = g / 1e4  # nothing is clipped
        rows = {i: operator(g[i], step=step, workers=[first + i], sizes=sizes) for i in range(3)}
        out = operator(g, step=step, workers=range(first, first + 3), sizes=sizes)
    for i in range(3):
        assert_identical(out[i], rows[i])


@each([RandK(8), QSGD(1), Compose(RandK(8), QSGD(1))])
def test_steps_workers_seeds_and_layers_draw_independently(operator):
    g = torch.ones(2, 64)
    one = operator(g, step=0)
    assert not torch.equal(one[0], one[1])
    assert not torch.equal(one, operator(g, step=1))
    if not isinstance(operator, Compose):
        other = type(operator)(8 if isinstance(operator, RandK) else 1, seed=1)
        assert not torch.equal(one, other(g, step=0))
        layers = type(operator)(8 if isinstance(operator, RandK) else 1, per_tensor=True)
        halves = layers(torch.ones(1, 128), sizes=[64, 64], step=0)
        assert not torch.equal(halves[0, :64], halves[0, 64:])


@each(RANDOM)
def test_calls_are_counted(operator):
    operator.reset()
    g = torch.linspace(-1, 1, 12).repeat(2, 1)
    counted = [operator(g) for _ in range(3)]
    for step, out in enumerate(counted):
        assert_identical(out, operator(g, step=step))
    state = operator.state_dict()
    fourth = operator(g)
    assert_identical(fourth, operator(g, step=3))
    operator.load_state_dict(state)
    assert_identical(operator(g), fourth)
    operator.reset()
    assert_identical(operator(g), counted[0])
    operator.reset()


def test_shared_sets_are_everyones():
    g = torch.randn(5, 30, generator=torch.Generator().manual_seed(0))
    operator = RandK(7, shared=True)
    kept = operator(g, step=3) != 0
    assert bool((kept == kept[0]).all())
    for i in range(5):
        assert_identical(operator(g[i], step=3, workers=[i]), operator(g, step=3)[i])


@pytest.mark.parametrize(
    "make",
    [
        lambda g: RandK(3, generator=g),
        lambda g: RandK(3, scaled=True, shared=True, generator=g),
        lambda g: QSGD(2, generator=g),
    ],
    ids=["randk", "shared", "qsgd"],
)
def test_a_generator_of_ones_own(make):
    g = torch.randn(4, 40, generator=torch.Generator().manual_seed(0))
    before = torch.get_rng_state()
    runs = []
    for _ in range(2):
        operator = make(torch.Generator().manual_seed(3))
        runs.append([operator(g) for _ in range(2)])
    for a, b in zip(*runs, strict=True):
        assert_identical(a, b)
    assert not torch.equal(runs[0][0], runs[0][1])
    assert not torch.equal(runs[0][0], make(torch.Generator().manual_seed(4))(g))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", ["randk", "qsgd", "composed", "fed back"])
def test_a_generator_goes_on_where_a_saved_one_stood(kind):
    def make(seed):
        generator = torch.Generator().manual_seed(seed)
        if kind == "qsgd":
            return QSGD(2, generator=generator)
        operator = RandK(3, generator=generator)
        return {"randk": operator, "composed": Compose(Clip(9.0), operator), "fed back": EF21(operator)}[kind]

    g = torch.randn(4, 40, generator=torch.Generator().manual_seed(0))
    operator, other = make(3), make(4)
    operator(g)
    file = io.BytesIO()
    torch.save(operator.state_dict(), file)
    file.seek(0)
    expected = [operator(g) for _ in range(2)]
    other.load_state_dict(torch.load(file, weights_only=True))
    for out in expected:
        assert_identical(other(g), out)


def test_a_generator_that_is_missing_or_one_too_many():
    generator = torch.Generator()
    for saved, other in ((RandK(3, generator=generator), RandK(3)), (QSGD(3), QSGD(3, generator=generator))):
        with pytest.raises(ValueError, match="when it was saved"):
            other.load_state_dict(saved.state_dict())


@each([RandK(3), QSGD(3), EF21(RandK(3))])
def test_a_state_without_the_number_of_calls(operator):
    state = {"workers": {}, "operator": {}} if operator.feeds_back else {}
    with pytest.raises(ValueError, match=r"resumes from its own state_dict\(\): 'calls', .*; got nothing"):
        operator.load_state_dict(state)


def test_qsgd_without_room_for_its_norm():
    """The norm 2 max is beyond float32, C(g) = g is not: the call says it, a message cannot."""
    largest = torch.finfo(torch.float32).max
    g = torch.tensor([largest, -largest, largest, largest])
    assert_identical(QSGD(2)(g), g)
    with pytest.raises(NonFiniteError, match=r"qsgd:2 .*range of torch\.float32"):
        QSGD(2).encode(g)


def test_compositions_carry_what_their_members_do():
    assert Compose(Clip(1.0), TopK(2)).state_dict() == {}
    operator = Compose(Clip(1.0), RandK(2))
    operator(torch.ones(3))
    assert operator.state_dict() == {"1": {"calls": 1}}
    for bad in ({}, {"0": {"calls": 1}}):
        with pytest.raises(ValueError, match=r"carries the state of operators \['1'\]"):
            operator.load_state_dict(bad)


@pytest.mark.parametrize("operator", [RandK(9), Compose(RandK(2), TopK(9))], ids=repr)
def test_a_call_that_fails_does_not_count(operator):
    with pytest.raises(ValueError, match="1 <= k <= 6"):
        operator(WIDE)
    fresh = {"calls": 0}
    assert operator.state_dict() == (fresh if isinstance(operator, RandK) else {"0": fresh})


@each([RandK(2), QSGD(1), Compose(RandK(4), QSGD(3)), RandK(2, per_tensor=True)])
def test_draws_go_by_the_workers_numbers(operator):
    g = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    whole = operator(g, step=2, sizes=[2, 4])
    for workers in ([3], [4, 0], [1, 3, 2]):
        assert_identical(operator(g[workers], step=2, workers=workers, sizes=[2, 4]), whole[workers])


def test_global_generators_are_untouched():
    np_before, before = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    for operator in RANDOM:
        operator(WIDE, step=0)
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == np_before).all()  # noqa: NPY002


@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, True, "0"])
def test_bad_seeds(seed):
    for make in (lambda: RandK(1, seed=seed), lambda: QSGD(1, seed=seed)):
        with pytest.raises(ValueError, match="0 <= seed < 2"):
            make()


def test_two_of_a_kind_draw_independently():
    """Half of a half is a quarter, and rounding twice is unbiased: with the same numbers neither would hold."""
    kept = (sample(Compose(RandK(ratio=0.5), RandK(ratio=0.5)), torch.ones(40), 500) != 0).sum(1)
    assert 8 < float(kept.double().mean()) < 12
    assert_mean(sample(Compose(QSGD(3), QSGD(2)), WIDE), WIDE)


# their moments


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("d", [1, 2, 5])
def test_rand_k_over_all_sets(d, scaled):
    """Mean and mean square error: (1 - K/d) ||g||^2 unscaled, (d/K - 1) ||g||^2 scaled (docs/theory/operators.md)."""
    g = WIDE[:d]
    for k in range(1, d + 1):
        sets = torch.tensor(list(itertools.combinations(range(d), k)))
        out = rand_k(g.expand(len(sets), d), sets) * (d / k if scaled else 1)
        torch.testing.assert_close(out.mean(0), g if scaled else g * k / d)
        mse = (out - g).square().sum(1).mean()
        torch.testing.assert_close(mse, (d / k - 1 if scaled else 1 - k / d) * g.square().sum())
        alpha = RandK(k, scaled=scaled).contraction(d)
        if alpha is None:
            assert d / k - 1 >= 1
        else:
            assert float(mse) == pytest.approx((1 - alpha) * float(g.square().sum()))


@pytest.mark.parametrize(("k", "scaled"), [(2, True), (5, True), (3, False)])
def test_rand_k_draws_all_sets_alike(k, scaled):
    operator = RandK(k, scaled=scaled)
    out = sample(operator, WIDE + 3)
    assert bool(((out != 0).sum(1) == k).all())
    assert_mean(out, (WIDE + 3) * (1 if scaled else k / 6))
    _, counts = (out != 0).long().unique(dim=0, return_counts=True)
    total = math.comb(6, k)
    assert len(counts) == total
    expected = DRAWS / total
    chi2 = float(((counts - expected).square() / expected).sum())
    assert chi2 < (total - 1) + 5 * math.sqrt(2 * (total - 1))


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_qsgd_over_all_roundings(levels):
    """Unbiased, with E ||C(g) - g||^2 = omega(g) ||g||^2 exactly: each entry goes up or down by itself."""
    g = WIDE[:4]
    norm = g.norm()
    phi = (levels * g.abs() / norm).frac()
    mean, square = torch.zeros(4, dtype=torch.float64), 0.0
    for up in itertools.product([False, True], repeat=4):
        chosen = torch.tensor(up)
        chance = float(torch.where(chosen, phi, 1 - phi).prod())
        # a number just below or just at the fraction goes up or stays
        uniform = torch.where(chosen, (phi - 1e-9).clamp_min(0), (phi + 1e-9).clamp_max(1 - 1e-12))
        length, whole = quantize(g, uniform, levels)
        out = length * whole / levels
        if chance > 0:
            assert bool((whole.abs() == (levels * g.abs() / norm).floor() + chosen).all())
        mean += chance * out
        square += chance * float((out - g).square().sum())
    torch.testing.assert_close(mean, g, atol=1e-12, rtol=0)
    omega = float((phi * (1 - phi)).sum()) / levels**2
    assert square == pytest.approx(omega * float(norm) ** 2, abs=1e-12)
    assert omega <= QSGD(levels).constants(4).M


@settings(deadline=None, max_examples=40)
@given(g=gradients(min_d=1), levels=st.sampled_from([1, 2, 16, 1000]))
def test_qsgd_s_variance_is_within_its_bound(g, levels):
    """By the exact omega(g), for any gradient; and what is rounded lies on a level next to the entry."""
    g = g.double().reshape(-1, g.shape[-1])
    operator, norm = QSGD(levels), g.norm(dim=-1, keepdim=True)
    x = levels * g.abs() / norm.clamp_min(1e-300)
    omega = (x.frac() * (1 - x.frac())).sum(-1) / levels**2
    d = g.shape[-1]
    assert bool((omega <= operator.constants(d).M + 1e-12).all())
    alpha = operator.contraction(d)
    assert alpha is None or bool((omega <= 1 - alpha + 1e-12).all())
    assert (alpha is None) == (min(d / levels**2, math.sqrt(d) / levels) >= 1)
    assert bool(((operator(g) - g).abs() <= norm / levels * (1 + 1e-12)).all())


@pytest.mark.parametrize("levels", [1, 2, 7])
def test_qsgd_is_unbiased_as_it_draws(levels):
    out = sample(QSGD(levels), WIDE)
    assert_mean(out, WIDE)
    x = levels * WIDE.abs() / WIDE.norm()
    variance = (WIDE.norm() / levels) ** 2 * x.frac() * (1 - x.frac())
    assert_mean((out - WIDE).square(), variance)


@pytest.mark.parametrize(
    "operator",
    [RandK(2), RandK(2, scaled=True), RandK(2, shared=True), RandK(2, scaled=True, shared=True), QSGD(2)],
    ids=repr,
)
def test_bias_and_noise_of_the_mean_over_workers(operator):
    """The row (B, b2, M, sigma2) of docs/theory/operators.md on workers that differ; Rand-K's is exact."""
    n, d = 3, 6
    generator = torch.Generator().manual_seed(1)
    g = torch.randn(n, d, generator=generator, dtype=torch.float64)
    mean = g.mean(0)
    zeta2, square = float((g - mean).square().sum(1).mean()), float(mean.square().sum())
    row = operator.constants(d, workers=n, zeta2=zeta2)
    errors = torch.stack([operator(g, step=step).mean(0) - mean for step in range(1500)])
    total = errors.square().sum(1)
    margin = 5 * float(total.std()) / math.sqrt(len(total))
    bound = row.B * square + row.b2 + row.M * square + row.sigma2
    assert float(total.mean()) <= bound + margin
    if isinstance(operator, RandK):
        assert float(total.mean()) == pytest.approx(bound, abs=margin)
    if not operator.spec.endswith("randk:2:shared"):
        expected = mean * (-(1 - 2 / d) if operator.spec in ("randk:2", "randk:2:shared") else 0.0)
        assert_mean(errors, expected)


def test_feedback_around_draws_counts_calls_too():
    g = torch.linspace(-1, 1, 24, dtype=torch.float64).view(2, 12)
    operator, twin = EF21(RandK(3, seed=9)), RandK(3, seed=9)
    h = torch.zeros_like(g)
    for step in range(4):
        h = h + twin(g - h, step=step)
        assert_identical(operator(g), h)
