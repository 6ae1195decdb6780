"""Normalised momentum."""

from __future__ import annotations

import math

import pytest
import torch
from optimizers import make_params, scalar, set_gradients, step_once
from torch import Tensor, nn

from metamom import CompositeMomentum
from metamom.theory import bound_1c


@pytest.mark.parametrize("foreach", [False, True, None])
@pytest.mark.parametrize("first_step", ["zero", "gradient"])
@pytest.mark.parametrize("beta", [0.2, 1.0])
def test_normalised_steps_written_out(beta, first_step, foreach):
    """``w <- w - lr v / ||v||`` with the norm over all tensors of both groups."""
    params, twins = make_params(torch.float64), make_params(torch.float64)
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.3}]
    optimizer = CompositeMomentum(groups, lr=0.1, beta=beta, first_step=first_step, foreach=foreach, normalize=True)
    v: list[Tensor] = []
    for step in range(6):
        set_gradients(params, step)
        set_gradients(twins, step)
        optimizer.step()
        grads = [twin.grad for twin in twins]
        v = v or [g.clone() if first_step == "gradient" else torch.zeros_like(g) for g in grads]
        v = [(1 - beta) * old + beta * g for old, g in zip(v, grads, strict=True)]
        norm = torch.cat([x.flatten() for x in v]).norm()
        for i, (p, twin, x) in enumerate(zip(params, twins, v, strict=True)):
            twin.data -= (0.1 if i < 2 else 0.3) * x / norm
            torch.testing.assert_close(p, twin, rtol=1e-13, atol=1e-14)


def test_a_normalised_step_is_as_long_as_the_step_size():
    params = make_params()
    before = torch.cat([p.detach().flatten().clone() for p in params])
    set_gradients(params, 0)
    CompositeMomentum(params, lr=0.25, normalize=True).step()
    assert float((torch.cat([p.detach().flatten() for p in params]) - before).norm()) == pytest.approx(0.25, rel=1e-6)


def test_normalised_half_precision_neither_overflows_nor_vanishes():
    """The squares of 1e-5 and 1e3 do, in float16; each step is 1 / sqrt(2), rounded to 11 bits."""
    for size in (1e-5, 1e3):
        params = [nn.Parameter(torch.zeros(1, dtype=torch.float16)) for _ in range(2)]
        step_once(CompositeMomentum(params, lr=1.0, beta=1.0, normalize=True), size)
        for p in params:
            assert p.item() == pytest.approx(-(0.5**0.5), rel=2e-2 if size < 1 else 2**-10)  # 1e-5 is 168 * 2^-24 there


def test_no_direction_and_no_number():
    still = scalar()
    step_once(CompositeMomentum([still], lr=1.0, normalize=True), 0.0)
    assert still.item() == 1.0
    lost = scalar()
    step_once(CompositeMomentum([lost], lr=1.0, normalize=True), math.nan)
    assert math.isnan(lost.item())


def test_a_group_that_does_not_normalise_is_left_out_of_the_norm():
    plain, normal = scalar(), scalar()
    groups = [{"params": [plain]}, {"params": [normal], "normalize": True}]
    step_once(CompositeMomentum(groups, lr=0.1, beta=1.0), [30.0, 4.0])
    assert (plain.item(), normal.item()) == pytest.approx((1 - 3.0, 1 - 0.1))


@pytest.mark.parametrize("beta", [1.0, 0.3, 0.1])
@pytest.mark.parametrize("gamma", [0.02, 0.2])
def test_normalised_momentum_stays_within_its_bound(beta, gamma):
    """The mean norm of the gradient under adversarial bias, on sum a (1 - cos x), L = max a."""
    a, b, K = torch.tensor([1.0, 0.5, 0.25], dtype=torch.float64), 0.05, 300
    x = nn.Parameter(torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64))
    optimizer = CompositeMomentum([x], lr=gamma, beta=beta, normalize=True)
    gap = float((a * (1 - torch.cos(x.detach()))).sum())
    norms = []
    for _ in range(K):
        gradient = a * torch.sin(x.detach())
        norms.append(float(gradient.norm()))
        x.grad = gradient * (1 - b / max(norms[-1], 1e-12))  # against the gradient
        optimizer.step()
    assert sum(norms) / K <= bound_1c(1.0, beta, gamma, gap, norms[0], K, b, 0.0) * (1 + 1e-9)
