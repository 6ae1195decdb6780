"""Gradients averaged several times, double momentum, and what the theory knows of each method."""

from __future__ import annotations

from itertools import pairwise
from math import inf, sqrt

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metamom import theory
from metamom.bias.spec import parse
from metamom.common.choices import VARIANTS
from metamom.theory.methods import KNOWN, Method, method_step

F64 = torch.float64


def step(x, averages, weights, gradient, gamma):
    """One step of the definition, in plain words."""
    moving = gradient
    after = []
    for m, w in zip(averages, weights, strict=True):
        moving = (1 - w) * m + w * moving
        after.append(moving)
    return x - gamma * moving, after


def spectral_radius(weights, L, gamma):
    """From the images of the unit vectors."""
    columns = []
    for i in range(len(weights) + 1):
        state = [float(j == i) for j in range(len(weights) + 1)]
        x, averages = step(state[0], state[1:], weights, L * state[0], gamma)
        columns.append([x, *averages])
    return float(torch.linalg.eigvals(torch.tensor(columns, dtype=F64).T).abs().max())


@settings(deadline=None, max_examples=60)
@given(weights=st.lists(st.floats(0.03, 1.95), min_size=1, max_size=5), L=st.floats(0.1, 10.0))
def test_the_limit_separates_stable_from_unstable(weights, L):
    limit = theory.averaged_limit(weights, L)
    for share in (0.1, 0.5, 0.9, 0.999):
        assert spectral_radius(weights, L, share * limit) < 1 + 1e-9, share
    assert spectral_radius(weights, L, 1.001 * limit) > 1


@pytest.mark.parametrize("beta", [1.0, 0.5, 0.1])
def test_one_average_is_momentum(beta):
    assert theory.averaged_limit([beta], 2.0) == pytest.approx(theory.stable_limit(2.0, beta), rel=1e-12)
    law = theory.stationary([1.0, 0.25], [0.3, 0.7], 0.0, beta, 0.5)
    assert theory.averaged_floor([1.0, 0.25], [0.3, 0.7], [beta], 0.5) == pytest.approx(law.grad_sq, rel=1e-12)


@pytest.mark.parametrize("weights", [[0.3, 0.5], [0.2, 0.2, 1.4]])
def test_the_floor_is_what_the_noise_leaves(weights):
    """Its series: the squared responses of the gradient to one step's noise, added up."""
    lam, gamma, variance, total = 0.7, 0.2, 0.3, 0.0
    x, averages = step(0.0, [0.0] * len(weights), weights, 1.0, gamma)
    for _ in range(3000):
        total += (lam * x) ** 2
        x, averages = step(x, averages, weights, lam * x, gamma)
    assert theory.averaged_floor(lam, variance, weights, gamma) == pytest.approx(variance * total, rel=1e-10)


def test_order_and_weights_of_one_do_not_matter():
    assert theory.averaged_limit([0.3, 0.1], 1.0) == pytest.approx(theory.averaged_limit([0.1, 0.3], 1.0))
    assert theory.averaged_limit([0.3, 1.0], 1.0) == pytest.approx(theory.averaged_limit([0.3], 1.0))


@pytest.mark.parametrize("bad", [[], [0.0], [2.0], [0.5, -1.0]])
def test_weights_out_of_range(bad):
    with pytest.raises(ValueError, match=r"weights must be one number or more in \(0, 2\); got"):
        theory.averaged_limit(bad, 1.0)


def test_the_floor_needs_a_stable_step():
    with pytest.raises(ValueError, match="stable for 0 < gamma < 2; got gamma=2"):
        theory.averaged_floor(1.0, 0.1, [1.0], 2.0)
    with pytest.raises(ValueError, match="curvatures lam must be > 0"):
        theory.averaged_floor([1.0, 0.0], 0.1, [1.0], 0.1)


@pytest.mark.parametrize("alpha_c", [1.0, 0.5, 0.05])
@pytest.mark.parametrize("eta", [1.0, 0.3, 0.05])
def test_guaranteed_steps_are_below_the_exact_limits(alpha_c, eta):
    """For every linear contraction ``C(g) = c g``."""
    a = sqrt(1 - alpha_c)
    for c in (1 - a, 1.0, min(1 + a, 1.999)):
        assert theory.ef21_step(alpha_c, 1.0, 1.0) < theory.averaged_limit([c], 1.0)
        assert theory.ef21_sgdm_step(alpha_c, eta, 1.0, 1.0) < theory.averaged_limit([eta, c], 1.0)
        assert theory.ef21_sgd2m_step(alpha_c, eta, 1.0, 1.0) < theory.averaged_limit([eta, eta, c], 1.0)


def test_ef21_sgd2m_limits():
    """Without compression and averages it is gradient descent: 1/L. The floor falls with eta."""
    assert theory.ef21_sgd2m_step(1.0, 1.0, 2.0, 3.0) == pytest.approx(0.5)
    steps = [theory.ef21_sgd2m_step(0.5, eta, 1.0, 1.5) for eta in (1.0, 0.5, 0.1, 0.01)]
    floors = [
        theory.bound_ef21_sgd2m(0.5, eta, 1.0, 1.5, gamma, 1.0, inf, 1.0, 10_000)
        for eta, gamma in zip((1.0, 0.5, 0.1, 0.01), steps, strict=True)
    ]
    assert all(small < large for large, small in pairwise(floors))
    with pytest.raises(ValueError, match=r"EF21-SGD2M .* needs 0 < gamma <="):
        theory.bound_ef21_sgd2m(0.5, 0.3, 1.0, 1.5, 1.0, 1.0, 10, 1.0)


def top(g, k):
    return g * (g.abs() >= g.abs().topk(k, -1).values[..., -1:])


@pytest.mark.parametrize("eta", [1.0, 0.5, 0.2])
@pytest.mark.parametrize("k", [1, 3])
def test_no_run_of_ef21_sgd2m_exceeds_its_bound(eta, k):
    """Four workers' quadratics that differ; the mean over 100 chains with noise, at every K."""
    generator = torch.Generator().manual_seed(3)
    n = d = 4
    a = 0.2 + torch.rand(n, d, generator=generator, dtype=F64)
    c = torch.randn(n, d, generator=generator, dtype=F64)
    L, L_tilde = float(a.mean(0).max()), float(a.amax(-1).square().mean().sqrt())
    gamma, best = theory.ef21_sgd2m_step(k / d, eta, L, L_tilde), (a * c).mean(0) / a.mean(0)
    x, chains = torch.full((100, 1, d), 2.0, dtype=F64), 100
    true = a * (x[0] - c)
    v = true.expand(chains, n, d)
    u, g = v, torch.zeros(chains, n, d, dtype=F64)
    delta0 = float((a * ((2.0 - c) ** 2 - (best - c) ** 2)).sum(-1).mean() / 2)
    seen, start = 0.0, None
    for K in range(1, 101):
        noise = sqrt(0.5 / d) * torch.randn(chains, n, d, generator=generator, dtype=F64)
        if K > 1:  # v_0 and u_0 are the gradients at x_0
            v = (1 - eta) * v + eta * (a * (x - c) + noise)
            u = (1 - eta) * u + eta * v
        g = g + top(u - g, k)
        if start is None:
            start = theory.DoubleStart(message=float((g - u).square().sum(-1).mean()))
        seen += float((a * (x - c)).mean(1).square().sum(-1).mean())
        x = x - gamma * g.mean(1, keepdim=True)
        assert seen / K <= theory.bound_ef21_sgd2m(k / d, eta, L, L_tilde, gamma, delta0, K, 0.5, n, start)


NUMBERS = {"alpha_c": 0.25, "omega": 3.0, "eta": 0.2, "server": 0.5, "p": 0.25, "L_tilde": 1.5, "workers": 4}


@pytest.mark.parametrize("name", [name for name in KNOWN if name not in VARIANTS])
def test_every_method_has_a_step_and_a_floor(name):
    limit = theory.suggest_step(1.0, 1.0, method=Method(name, **NUMBERS))
    assert 0 < limit < inf
    assert limit == method_step(Method(name, **NUMBERS), 1.0)
    said = theory.explain(1.0, 0.5, 0.1, 1.0, 1000, 0.2, 0.1, method=Method(name, **NUMBERS)).text
    assert f"With {name}: " in said
    assert f"{limit:.3g}" in said
    assert KNOWN[name].source in said
    words = {"ef21-sgdm": "(0.2)", "ef21-sgd2m": "(0.2)", "diana": "(0.2)", "marina": "(0.2)", "dasha": "(0.2)"}
    spec = "clip21-sgd2m:1" if name == "clip21-sgd2m" else f"{name}{words.get(name, '')}:topk:1"
    if name != "ef21-p":  # the operator of ef21-p is that of down_bias, without a SPEC of its own
        assert parse(spec).spec.startswith(name)  # the names are those of operators


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_have_schedules_instead_of_a_step(name):
    powers = theory.variant_powers(name)
    assert method_step(Method(name), 1.0) == inf
    said = theory.explain(1.0, 1.0, 0.1, 1.0, 1000, 0.2, 0.1, method=Method(name)).text
    assert f"weights t^(-{powers.weight}) and normalised steps of length gamma t^(-{powers.step})" in said
    assert f"falls as t^(-{powers.rate}); no gamma is too large" in said
    with pytest.raises(ValueError, match=f"{name} with normalised steps has no largest step size"):
        theory.suggest_step(1.0, 1.0, method=Method(name))


def test_absent_workers_and_compressed_messages_down():
    absent = Method("ef21", alpha_c=0.5, participation=0.5)
    assert theory.suggest_step(2.0, 1.0, method=absent) == theory.ef21_pp_step(0.5, 0.5, 2.0, 2.0)
    assert theory.suggest_step(2.0, 1.0, method=Method("ef21-p", alpha_c=0.75)) == theory.ef21_p_step(0.75, 2.0) == 0.25
    with pytest.raises(ValueError, match=r"absent workers with ef21 only; got ef14 with participation=0\.5"):
        method_step(Method("ef14", alpha_c=0.5, participation=0.5), 1.0)
    with pytest.raises(ValueError, match="participation"):
        method_step(Method("ef21", alpha_c=0.5, participation=1.5), 1.0)


def test_method_steps_are_those_of_their_functions():
    assert method_step(Method("ef21", alpha_c=0.25), 1.0) == theory.ef21_step(0.25, 1.0, 1.0)
    assert method_step(Method("diana", omega=3.0, workers=4), 2.0) == theory.diana_step(3.0, 0.25, 2.0, 2.0, 4)
    assert method_step(Method("clip21-sgd2m", eta=0.1, server=0.5), 1.0) == theory.averaged_limit([0.1, 0.5], 1.0)


def test_what_is_missing_or_unknown_is_named():
    with pytest.raises(ValueError, match=r"the step limit of ef21 needs alpha_c; pass Method\('ef21', alpha_c="):
        method_step(Method("ef21"), 1.0)
    with pytest.raises(ValueError, match=r"the theory knows the methods ef14, .*; got 'ef22'"):
        method_step(Method("ef22"), 1.0)
    with pytest.raises(ValueError, match=r"plain steps on the server, beta=1; got beta=0\.1"):
        theory.suggest_step(1.0, method=Method("ef21", alpha_c=0.5))
