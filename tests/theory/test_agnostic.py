"""The schedules without constants: their powers balance the terms of the bound, and their rate is seen."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from metamom import CompositeMomentum
from metamom.common.choices import VARIANTS
from metamom.theory import variant_powers, variant_step, variant_weight


def rate(variant: str, a: Fraction, b: Fraction) -> Fraction:
    """The power of 1/T in the largest term of the bound, for ``eta = t^-a`` and ``gamma = t^-b``."""
    lag = {"heavy-ball": b - a, "igt": 2 * (b - a), "storm": b - a / 2, "hessian": b - a / 2}[variant]
    return min(1 - b, a / 2, lag)


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_other_powers_have_a_better_rate(variant):
    powers = variant_powers(variant)
    assert rate(variant, powers.weight, powers.step) == powers.rate
    grid = [Fraction(i, 84) for i in range(1, 84)]  # 84 is a multiple of 3, 4 and 7
    found = {(a, b): rate(variant, a, b) for a in grid for b in grid}
    best = max(found.values())
    assert best == powers.rate
    assert [at for at, value in found.items() if value == best] == [(powers.weight, powers.step)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_values(variant):
    powers = variant_powers(variant)
    for t in (1, 2, 50):
        assert variant_weight(variant, t) == pytest.approx(t ** -float(powers.weight), rel=1e-14)
        assert variant_step(variant, t, 0.3) == pytest.approx(0.3 * t ** -float(powers.step), rel=1e-14)
    assert variant_weight(variant, 1) == variant_step(variant, 1) == 1


def test_refusals():
    for function in (variant_weight, variant_step):
        with pytest.raises(ValueError, match="t must be"):
            function("igt", 0)
        with pytest.raises(ValueError, match="variant must be one of"):
            function("svrg", 1)
    with pytest.raises(ValueError, match="gamma must be"):
        variant_step("igt", 1, 0.0)


@pytest.mark.parametrize("variant", ["igt", "storm", "hessian"])
def test_less_noise_than_heavy_ball_where_it_matters(variant):
    """On a noisy quadratic, gradient norms at the end, over 20 seeds; heavy ball's schedules leave more."""

    def end(kind: str) -> float:
        generator = torch.Generator().manual_seed(0)
        A = torch.linspace(0.2, 1.0, 5, dtype=torch.float64)
        w = torch.nn.Parameter(torch.ones(20, 5, dtype=torch.float64))
        # each seed is a run of its own, since steps are not normalised here
        optimizer = CompositeMomentum([w], lr=1.0, beta=1.0, variant=kind)
        total = 0.0
        for t in range(1, 201):
            noise = torch.randn(20, 5, generator=generator, dtype=torch.float64)

            def closure(noise=noise):
                w.grad = A * w.detach() + noise

            optimizer.param_groups[0]["lr"] = variant_step(kind, t)
            optimizer.param_groups[0]["beta"] = variant_weight(kind, t)
            if kind == "hessian":
                moved = w.detach() - optimizer.previous().get(w, w.detach())
                closure()
                optimizer.transport({w: A * moved})
                optimizer.step()
            else:
                optimizer.step(closure)
            if t > 100:
                total += float((A * w.detach()).norm(dim=1).mean()) / 100
        return total

    assert end(variant) < end("heavy-ball")
