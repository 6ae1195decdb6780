"""The privacy of clipped and noisy messages, against the Gaussian mechanism's closed form."""

from __future__ import annotations

import math
import re
import sys
import warnings

import pytest
import torch
from scipy.optimize import brentq
from scipy.stats import norm

from metamom import GaussianNoise
from metamom.bias import Clip, Clip21SGD2M, Compose, parse, privacy_spent
from metamom.bias.noise import gaussian
from metamom.bias.privacy import noise_multiplier


def exact_epsilon(multiplier: float, steps: int, delta: float) -> float:
    """``steps`` Gaussian mechanisms are one with ``mu = sqrt(steps) / multiplier`` (Balle, Wang, 2018, theorem 8)."""
    mu = math.sqrt(steps) / multiplier

    def excess(epsilon: float) -> float:
        return float(norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu)) - delta

    return float(brentq(excess, 0, 200))


@pytest.mark.parametrize(
    ("spec", "multiplier"),
    [
        ("clip21-sgd2m:0.5:noise=2", 2.0),
        ("clip:2+noise:1", 0.25),
        ("clip:2+noise:1+topk:1", 0.25),
        ("normalize+clip:2+noise:1", 0.25),
        ("ef21:clip:2+noise:1", 0.25),
    ],
)
def test_noise_over_sensitivity(spec, multiplier):
    assert noise_multiplier(parse(spec)) == multiplier


@pytest.mark.parametrize(
    "spec",
    [
        "none",
        "noise:1",
        "clip:1",
        "clip21-sgd2m:1",
        "clip:1:tensor+noise:1",
        "noise:1+clip:1",
        "marina(0.1):clip:1+noise:1",
    ],
)
def test_what_bounds_nothing(spec):
    with pytest.raises(ValueError, match=re.escape(f"{spec} does not bound what a message reveals: take clip21-sgd2m")):
        privacy_spent(spec, 1, 1e-5)


@pytest.mark.parametrize(
    ("steps", "delta", "message"),
    [
        (0, 1e-5, "whole number >= 1; got 0"),
        (2.0, 1e-5, r"got 2\.0"),
        (1, 0.0, r"\(0, 1\); got 0\.0"),
        (1, 1.0, "got 1"),
    ],
)
def test_numbers_out_of_range(steps, delta, message):
    with pytest.raises(ValueError, match=message):
        privacy_spent("clip:1+noise:1", steps, delta)
    with pytest.raises(TypeError, match="got None"):
        privacy_spent(None, 1, 1e-5)


def test_without_opacus(monkeypatch):
    monkeypatch.setitem(sys.modules, "opacus.accountants", None)
    with pytest.raises(ImportError, match=r'pip install "metamom\[privacy\]"'):
        privacy_spent("clip:1+noise:1", 1, 1e-5)


def test_the_accountant_against_the_closed_form():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("opacus.accountants", exc_type=ImportError)
        for multiplier, steps, delta in ((5.0, 100, 1e-5), (20.0, 1000, 1e-6), (4.0, 1, 1e-5)):
            exact = exact_epsilon(multiplier, steps, delta)
            operator = Clip21SGD2M(0.5, noise=multiplier)
            assert exact <= privacy_spent(operator, steps, delta) <= exact + 0.02


def test_box_muller():
    """From uniform numbers (1 - e^-2, 1/4): radius 2, angle 90 degrees."""
    uniform = torch.tensor([[1 - math.exp(-2), 0.25]], dtype=torch.float64)
    torch.testing.assert_close(gaussian(uniform, 2), torch.tensor([[0.0, 2.0]], dtype=torch.float64))
    assert gaussian(torch.rand(3, 6, generator=torch.Generator().manual_seed(0)), 5).shape == (3, 5)


def test_noise_is_unbiased_with_its_variance():
    g = torch.tensor([3.0, -1.0, 2.0], dtype=torch.float64)
    noise = GaussianNoise(0.5)(g.expand(5000, -1), step=0) - g
    assert bool((noise.mean(0).abs() < 5 * 0.5 / math.sqrt(5000)).all())
    torch.testing.assert_close(noise.T.cov(), 0.25 * torch.eye(3, dtype=torch.float64), rtol=0, atol=0.03)
    composed = Compose(Clip(1.0), GaussianNoise(0.5))(g.expand(5000, -1), step=0)
    torch.testing.assert_close(composed.mean(0), g / g.norm(), rtol=0, atol=5 * 0.5 / math.sqrt(5000))
