"""`metamom.theory`: reference values of every bound to all their digits, ranges, suggestions and explanations."""

from itertools import pairwise
from math import inf

import pytest

from metamom import Clip, RandK, TopK, theory
from metamom.theory import (
    best_step,
    bound_1a,
    bound_1b,
    bound_1b_schedule,
    bound_1c,
    bound_ef14,
    bound_ef21,
    bound_ef21_sgdm,
    ef14_step,
    ef21_sgdm_step,
    ef21_step,
    explain,
    first_order_constants,
    inner_floor,
    max_step,
    max_step_1b,
    moml_kappa,
    phi0_1b,
    rate_2a,
    rate_2a_affine,
    rate_2b,
    rate_2b_bias,
    scsc_kappa,
    suggest_step,
    terms_1a,
    theta_star,
    tracking_step,
)

CASE = {"L": 2, "beta": 0.2, "gamma": 0.05, "K": 1000, "b2": 0.04, "sigma2": 0.5, "B": 0.1, "M": 0.3}
PL_CASE = {"L": 2, "mu": 0.1, "beta": 0.2, "gamma": 0.02, "b2": 0.04, "sigma2": 0.5}
AFFINE = rate_2a_affine(2, 0.1, 0.2, 0.01, b2=0.04, sigma2=0.5, B=0.2, M=0.1, theta=0.4)
EXACT = {"rel": 1e-14, "abs": 0}  # the values are printed to 16 digits; the last may be rounded otherwise

REFERENCE = {
    "1A": (bound_1a(delta0=3, **CASE), 0.29550827423167847),
    "1A step": (max_step(2, 0.2), 0.5 / 9),
    "1B": (bound_1b(phi0=3, **CASE), 0.5527685789455666),
    "1B theta*": (theta_star(1, 0.1, 0.01), 0.00825751150674466),
    "1B factor": (1 / (1 - theta_star(1, 0.1, 0.01)), 1.0083262657419167),
    "1C": (bound_1c(1, 0.1, 0.01, 1, 1, inf, b=0.3, sigma2=0.5), 1.109442842261525),
    "2A sharp": (rate_2a(**PL_CASE).bound(3, 500), 2.451536474345298),
    "2A simple": (rate_2a(**PL_CASE, form="simple").bound(3, 500), 3.754731831971358),
    "2A affine rate": (AFFINE.rate, 0.0006316259745003452),
    "2A affine floor": (AFFINE.floor, 1.8556855154216314),
    "2B": (rate_2b(**PL_CASE, at="z").bound(3, 500), 1.7305337645714756),
    "2B at x": (rate_2b(**PL_CASE).floor, 1.96),
    "SCSC kappa": (scsc_kappa(2.25, 0.2, 0.5, 3, 5), 1.2),
    "SCSC floor": (inner_floor("scsc", 2.25, 0.2, 0.5, 1, 5), 0.025),
    "SCSC floor, additive": (inner_floor("scsc", 2.25, 0.2, 0.5, 1, 5, additive=True), 0.0125),
    "EF14 floor": (bound_ef14(0.75, 1, 0.25, 1, inf, 2, b2=0.1, sigma_w2=1, workers=4), 0.1 + 0.0625 + 0.75),
    "EF21 step": (ef21_step(0.25, 1, 1.5), 0.0934915622441133),
    "EF21-SGDM step": (ef21_sgdm_step(0.25, 0.1, 1, 1.5), 0.02226381173118923),
    "EF21-SGDM floor": (bound_ef21_sgdm(0.25, 0.1, 1, 1.5, 0.02, 1, inf, 0.5, 4), 0.2675477866049424),
    "EF14 step": (ef14_step(0.25, 1), 0.07179676972449085),
    "MOML kappa": (moml_kappa(2.25, 1.5, 0.2), 363.3715061774828),
    "MOML step": (tracking_step(2.25, 0.1, moml_kappa(2.25, 1.5, 0.2)), 0.019993914344435388),
    "MOML floor": (inner_floor("moml", 2.25, 0.2, 0.5, 1, 5), 0.04262461179749811),
    "Top-K floor": (TopK(k=1).constants(4, zeta2=2).floor, 6),
    "clip floor": (Clip(1.0).constants(4, zeta2=2, bound=4).floor, 2.5714285714285716),
    "first-order floor": (first_order_constants(2, 0.1, 2).floor, 0.13333333333333333),
    "first-order B": (first_order_constants(2, 0.1, 2).B, 0.0625),
}


@pytest.mark.parametrize("name", REFERENCE)
def test_reference_values(name):
    computed, reference = REFERENCE[name]
    assert computed == pytest.approx(reference, **EXACT)


def test_simple_step_of_1b():
    assert max_step_1b(2, 0.2, "simple") == pytest.approx(0.052786404500, abs=5e-13)


def test_operators_enter_the_bound_by_their_constants():
    constants = RandK(ratio=0.25, scaled=False).constants(8, workers=4, zeta2=2)
    assert constants == (0.5625, 0, 0.046875, 0.09375)
    assert bound_1a(1, 1, 0.5, 1, inf, **constants._asdict()) == pytest.approx(0.5 * 0.09375 / (1 - 0.5625 - 0.0234375))


# In 40-digit arithmetic.
LIMITS = """
0.02 0.010101010101 0.010050506339 0.010101138279 0.009950124999 1.989949493661
0.1 0.052631578947 0.051316701949 0.052649331987 0.048765622559 1.948683298051
0.3 0.176470588235 0.163339973466 0.177099422220 0.139171283401 1.836660026534
0.5 0.333333333333 0.292893218813 0.337217330837 0.220695554634 1.707106781187
0.9 0.818181818182 0.683772233983 0.846675628044 0.360000000000 1.316227766017
1.0 1 1 1 0.390388203202 1
"""


@pytest.mark.parametrize("row", LIMITS.split("\n")[1:-1])
def test_step_limits(row):
    """beta; gamma_max L of 1A and of 1B in three forms; the factor on the floor of 1B."""
    beta, *wanted = map(float, row.split())
    floor = bound_1b(1, beta, 1e-3, 0, inf, b2=1, sigma2=0)
    forms = [max_step_1b(1, beta, form) for form in ("simple", "exact", "half")]
    assert [max_step(1, beta), *forms, floor] == pytest.approx(wanted, abs=6e-13)
    assert [max_step_1b(4, beta, form) * 4 for form in ("simple", "exact", "half")] == pytest.approx(forms)


@pytest.mark.parametrize("beta", [0.02, 0.1, 0.5, 0.9])
def test_theta_star_is_the_smallest_that_admits_the_step(beta):
    for part in (0.1, 0.5, 0.99, 1.0):
        gamma = part * max_step_1b(3, beta)
        theta = theta_star(3, beta, gamma)
        assert max_step_1b(3, beta, theta=theta) == pytest.approx(gamma, rel=1e-6 if part == 1 else 1e-9)
        assert part == 1 or max_step_1b(3, beta, theta=0.99 * theta) < gamma
    assert theta_star(3, 1, 0.3) == 0 == bound_1b(3, 1, 0.3, 0, 10, 0, 0, theta=0)


def test_constant_schedule_is_the_constant_bound():
    case = CASE | {"K": 20, "gamma": 0.04}
    start = phi0_1b(3, 0.2, 0.04, 1.5)
    K, beta, gamma = (case.pop(name) for name in ("K", "beta", "gamma"))
    schedule = bound_1b_schedule(betas=[beta] * K, gammas=[gamma] * K, phi0=start, **case)
    assert schedule == pytest.approx(bound_1b(beta=beta, gamma=gamma, K=K, phi0=start, **case), rel=1e-13)


def test_schedules_are_checked():
    with pytest.raises(ValueError, match=r"\(S1\).*at step 1"):
        bound_1b_schedule(1, [0.9, 0.1], [0.05, 0.05], 1, 0, 0)
    with pytest.raises(ValueError, match=r"\(S2\).*at step 0; got gamma=0.3"):
        bound_1b_schedule(1, [0.1, 0.1], [0.3, 0.2], 1, 0, 0)
    with pytest.raises(ValueError, match="as many betas as gammas"):
        bound_1b_schedule(1, [0.1], [0.3, 0.2], 1, 0, 0)


@pytest.mark.parametrize(("M", "sigma2", "b2"), [(0, 0, 0.1), (0, 2, 0.1), (0.5, 0, 0), (0.5, 1, 0.3), (3, 0.1, 2)])
def test_best_step_has_the_least_bound(M, sigma2, b2):
    args = {"L": 2, "beta": 0.3, "delta0": 4, "K": 300, "b2": b2, "sigma2": sigma2, "B": 0.2, "M": M}
    best = best_step(**args)
    limit = max_step(2, 0.3)
    least = bound_1a(gamma=best, **args)
    assert 0 < best <= limit
    for factor in (0.5, 0.99, 1.01, 2):
        if factor * best <= limit and 0.2 + 1.7 * 2 * factor * best * M < 1:
            assert bound_1a(gamma=factor * best, **args) > least
    assert suggest_step(**args) == best


def test_suggest_step():
    assert suggest_step(L=2, beta=0.2) == max_step(2, 0.2)
    with_noise = suggest_step(L=2, beta=0.2, M=50, B=0.5)
    assert 1.8 * 2 * with_noise * 50 == pytest.approx(0.25)
    with pytest.raises(ValueError, match="both delta0 and K"):
        suggest_step(L=1, delta0=1.0)
    with pytest.raises(ValueError, match="got 1, so nothing is guaranteed"):
        suggest_step(L=1, B=1.0)


@pytest.mark.parametrize(
    ("change", "dominant", "words"),
    [
        ({"delta0": 100.0}, "distance", ["more steps", "larger gamma", "up to 0.111"]),
        ({"delta0": 100.0, "gamma": 1 / 9}, "distance", ["needs a larger beta"]),
        ({"delta0": 100.0, "beta": 1.0, "gamma": 1.0}, "distance", ["the largest that the theorem allows"]),
        (
            {"b2": 3.0},
            "bias",
            ["gamma, beta, more steps and more workers do not", "error feedback", "Another estimator"],
        ),
        ({"sigma2": 30.0}, "noise", ["number of workers", "The best gamma for this K is"]),
        ({"sigma2": 30.0, "delta0": 0.0}, "noise", ["falls with gamma"]),
        ({"B": 0.5, "b2": 3.0}, "bias", ["1/(1 - B) = 2"]),
    ],
)
def test_explain(change, dominant, words):
    case = {"L": 1.0, "beta": 0.2, "gamma": 0.05, "delta0": 1.0, "K": 1000, "b2": 0.001, "sigma2": 0.001} | change
    explained = explain(**case)
    assert explained.dominant == dominant
    assert explained.terms == terms_1a(**case)
    assert all(word in str(explained) for word in words), str(explained)


def test_explain_in_the_end_and_without_error():
    assert str(explain(1, 1, 0.5, 1, inf, b2=0.2, sigma2=0.1)).startswith("In the limit")
    assert "is 0" in str(explain(1, 1, 0.5, 1, inf, b2=0, sigma2=0))


RANGES = [
    (lambda: max_step(0, 0.1), "L must be > 0"),
    (lambda: max_step(1, 0), r"beta must be in \(0, 1\]; got 0"),
    (lambda: max_step(1, float("nan")), "beta must be in"),
    (lambda: bound_1a(1, 0.1, 0.06, 1, 1, 0, 0), r"Theorem 1A .* needs 0 < gamma <= 0.0526316; got gamma=0.06"),
    (lambda: bound_1a(1, 0.1, 0.05, 1, 0, 0, 0), "K must be a number of steps >= 1"),
    (lambda: bound_1a(1, 0.1, 0.05, -1, 1, 0, 0), "delta0 must be >= 0"),
    (lambda: bound_1a(1, 0.1, 0.05, 1, 1, 0, 0, B=1), "nothing is guaranteed. Lower gamma"),
    (lambda: bound_1b(1, 0.1, 0.05, 1, 1, 0, 0, B=0.6), "theta_star"),
    (lambda: theta_star(1, 0.1, 0.06), "Theorem 1B"),
    (lambda: max_step_1b(1, 0.1, theta=1), "theta must be in"),
    (lambda: best_step(1, 0.1, 1, inf, 0, 1), "K must be > 0 and finite"),
    (lambda: rate_2a(1, 2, 0.1, 0.01, 0, 0), "mu cannot exceed L"),
    (lambda: rate_2a(1, 0.5, 0.1, 0.05, 0, 0), "Theorem 2A"),
    (lambda: rate_2a_affine(1, 0.5, 0.1, 0.05, 0, 0, 0.5, 0, 0.5), "theta must be in"),
    (lambda: rate_2a_affine(1, 0.5, 0.1, 0.9, 0, 0, 0.1, 0, 0.5), "Use a smaller step"),
    (lambda: rate_2b(1, 0.5, 0.1, 0.06, 0, 0), "Theorem 2B"),
    (lambda: rate_2b_bias(1, 0.9, 0.1, 0.09, 1), "smaller step"),
    (lambda: bound_ef21(0.5, 1, 1, 0.9, 1, 1, 1), "EF21"),
    (lambda: bound_ef14(0.5, 1, 0.9, 1, 1, 1), "EF14"),
    (lambda: bound_ef21_sgdm(0.5, 0.1, 1, 1, 0.9, 1, 1, 1), "EF21-SGDM"),
    (lambda: bound_ef14(1, 1, 0.9, 1, 1, 1, workers=0), "workers must be a whole number"),
    (lambda: inner_floor("maml", 1, 0.1, 0.1, 1, 5), "'moml', 'scsc'; got 'maml'"),
    (lambda: first_order_constants(2, 0.25, 1), r"alpha < 1/\(2L\) = 0.25"),
    (lambda: theory.meta_smoothness(2, 1, 0.6, 1, convex=True), "alpha <= 1/L = 0.5"),
    (lambda: theory.critical_beta(1.5), "lower gamma"),
    (lambda: theory.swinging_step(0.1, 1), "2 steps or more"),
]


@pytest.mark.parametrize(("call", "message"), RANGES)
def test_ranges(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_limits_fall_with_what_makes_the_problem_harder():
    """Stronger compression, stronger curvature, slower averages: no step size may grow."""
    for steps in (
        [ef21_step(a, 1, 1.5) for a in (1, 0.5, 0.1)],
        [ef14_step(a, 1) for a in (1, 0.5, 0.1)],
        [ef21_sgdm_step(0.5, e, 1, 1.5) for e in (0.5, 0.1, 0.01)],
        [tracking_step(1, 0.5, moml_kappa(1, 1, b)) for b in (1, 0.5, 0.1)],
        [max_step(1, b) for b in (1, 0.5, 0.1)],
    ):
        assert all(a > b for a, b in pairwise(steps))
    assert tracking_step(2, 0.3, 0) == pytest.approx(max_step(2, 0.3))
