"""CompositeMomentum: equal to torch's SGD where the two coincide, and its own definition elsewhere."""

from __future__ import annotations

import math

import pytest
import torch
from cases import loop_over
from hypothesis import given, settings
from hypothesis import strategies as st
from optimizers import assert_same, make_params, run, scalar, set_gradients, step_once
from torch import nn

from metamom import CompositeMomentum, momentum_update

BETAS = [0.01, 0.1, 0.3, 0.5, 0.9]


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.01}, {"maximize": True}], ids=["plain", "decay", "max"])
@loop_over(beta=BETAS, foreach=(False, True, None))
def test_gradient_start_is_dampened_sgd_bit_for_bit(beta, options, foreach):
    lr = 0.02 if not options.get("maximize") else 0.001  # ascent on a convex function grows
    ours = run(lambda p: CompositeMomentum(p, lr, beta, first_step="gradient", foreach=foreach, **options))
    theirs = run(lambda p: torch.optim.SGD(p, lr, momentum=1 - beta, dampening=1 - beta, foreach=False, **options))
    assert_same(ours, theirs)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.01}], ids=["plain", "decay"])
def test_zero_start_is_undampened_sgd_with_a_smaller_step(beta, options):
    ours = run(lambda p: CompositeMomentum(p, 0.02, beta, **options), dtype=torch.float64)
    theirs = run(lambda p: torch.optim.SGD(p, 0.02 * beta, momentum=1 - beta, **options), dtype=torch.float64)
    for a, b in zip(ours, theirs, strict=True):
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-12)  # the scale is 1


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.01}, {"maximize": True}], ids=["plain", "decay", "max"])
@loop_over(first_step=("zero", "gradient"), foreach=(False, True))
def test_beta_one_is_plain_sgd_bit_for_bit(first_step, foreach, options):
    ours = run(lambda p: CompositeMomentum(p, 0.003, 1.0, first_step=first_step, foreach=foreach, **options))
    assert_same(ours, run(lambda p: torch.optim.SGD(p, 0.003, **options)))


def test_the_two_first_steps_differ_as_stated():
    """From v_0 = g_0 the first gradient enters the sum of all steps with weight 1/beta instead of 1."""
    moved = {}
    for first_step in ("zero", "gradient"):
        optimizer = CompositeMomentum([w := scalar(0.0)], lr=1.0, beta=0.1, first_step=first_step)
        for k in range(2000):
            step_once(optimizer, 1.0 if k == 0 else 0.0)
        moved[first_step] = -w.item()
    assert moved["zero"] == pytest.approx(1, abs=1e-12)
    assert moved["gradient"] == pytest.approx(10, abs=1e-12)


def test_trajectory_of_a_biased_quadratic():
    """f = x^2/2, beta = 1/2, gamma = 1/3, bias +0.3, from x = 1, v = 0: worked out by hand."""
    optimizer = CompositeMomentum([x := scalar(1.0)], lr=1 / 3, beta=0.5)
    xs, vs = [], []
    for _ in range(5):
        step_once(optimizer, x.item() + 0.3)
        xs.append(x.item())
        vs.append(optimizer.state[x]["momentum"].item())
    assert xs == pytest.approx([0.7833333333, 0.4944444444, 0.2175925926, -0.0070987654, -0.1682613169], abs=1e-10)
    assert vs == pytest.approx([0.65, 0.8666666667, 0.8305555556, 0.6740740741, 0.4834876543], abs=1e-10)
    for _ in range(300):
        step_once(optimizer, x.item() + 0.3)
    assert x.item() == pytest.approx(-0.3, abs=1e-12)  # whatever beta: the bias sets the limit


finite = st.floats(-1e6, 1e6, allow_nan=False)


betas = st.floats(1e-6, 1.0)


@settings(deadline=None)
@given(v=st.lists(finite, min_size=1, max_size=6), beta=betas, data=st.data())
def test_momentum_update_is_a_convex_combination(v, beta, data):
    g = data.draw(st.lists(finite, min_size=len(v), max_size=len(v)))
    old, new = torch.tensor(v, dtype=torch.float64), torch.tensor(g, dtype=torch.float64)
    kept = old.clone(), new.clone()
    out = momentum_update(old, new, beta)
    slack = 1e-15 * (old.abs() + new.abs())  # two roundings
    assert bool((out >= torch.minimum(old, new) - slack).all())
    assert bool((out <= torch.maximum(old, new) + slack).all())
    assert torch.equal(old, kept[0])
    assert torch.equal(new, kept[1])


@settings(deadline=None)
@given(gs=st.lists(finite, min_size=1, max_size=30), v=finite, beta=betas)
def test_k_updates_are_the_weighted_average_of_their_gradients(gs, v, beta):
    """v_K = (1-b)^(K+1) v_{-1} + b sum_k (1-b)^(K-k) g_k, with weights that sum to one."""
    buf = torch.tensor(v, dtype=torch.float64)
    for g in gs:
        buf = momentum_update(buf, torch.tensor(g, dtype=torch.float64), beta)
    weights = [beta * (1 - beta) ** (len(gs) - 1 - k) for k in range(len(gs))]
    first = (1 - beta) ** len(gs)
    assert math.isclose(first + sum(weights), 1, rel_tol=1e-9)
    expected = first * v + math.fsum(w * g for w, g in zip(weights, gs, strict=True))
    assert buf.item() == pytest.approx(expected, rel=1e-12, abs=1e-12 * max(map(abs, [v, *gs])))


@pytest.mark.parametrize("past", [math.nan, math.inf])
def test_beta_one_forgets_even_a_past_that_is_not_finite(past):
    assert momentum_update(torch.tensor([past]), torch.tensor([3.0]), 1.0).tolist() == [3.0]


@pytest.mark.parametrize("beta", [0.0, -0.1, 1.1, math.nan, math.inf])
def test_beta_out_of_range(beta):
    with pytest.raises(ValueError, match=r"beta .* must be in \(0, 1\]"):
        momentum_update(torch.zeros(1), torch.zeros(1), beta)
    with pytest.raises(ValueError, match=r"beta .* must be in \(0, 1\]"):
        CompositeMomentum(make_params(), 0.1, beta)
    optimizer = CompositeMomentum([scalar()], 0.1, 0.5)
    optimizer.param_groups[0]["beta"] = beta
    with pytest.raises(ValueError, match=r"beta .* must be in \(0, 1\]"):
        step_once(optimizer, 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64])
@loop_over(beta=(0.1, 1.0), first_step=("zero", "gradient"), more=({}, {"decoupled_weight_decay": True, "lr": 0.5}))
def test_together_and_one_by_one_agree_exactly(dtype, beta, first_step, more):
    options = {"lr": 0.02, "beta": beta, "first_step": first_step, "weight_decay": 0.02, **more}
    single = run(lambda p: CompositeMomentum(p, foreach=False, **options), 20, dtype)
    together = run(lambda p: CompositeMomentum(p, foreach=True, **options), 20, dtype)
    assert_same(single, together)
    assert all(p.dtype == dtype for p in together[-1])


def test_one_group_may_mix_dtypes():
    params = [scalar(1.0, torch.float32), scalar(1.0, torch.float64), scalar(2.0, torch.float32)]
    step_once(CompositeMomentum(params, 0.1, 0.5, foreach=True), 1.0)
    assert [p.item() for p in params] == pytest.approx([0.95, 0.95, 1.95])
    assert params[1].item() == 1 - 0.1 * 0.5


@pytest.mark.parametrize("foreach", [False, True])
def test_sparse_gradients_are_refused(foreach):
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    before = embedding.weight.detach().clone()
    optimizer = CompositeMomentum(embedding.parameters(), lr=0.1, foreach=foreach)
    with pytest.raises(TypeError, match=r"dense gradients; got one with layout torch.sparse_coo .*\(4, 2\)"):
        optimizer.step()
    assert torch.equal(embedding.weight, before)


@pytest.mark.parametrize("foreach", [False, True])
def test_parameters_without_gradient_are_left_alone(foreach):
    used, idle = scalar(1.0), scalar(2.0)
    optimizer = CompositeMomentum([used, idle], lr=0.1, beta=0.5, weight_decay=0.1, foreach=foreach)
    used.grad = torch.ones_like(used)
    optimizer.step()
    assert idle.item() == 2.0
    assert idle not in optimizer.state
    idle.grad = torch.ones_like(idle)
    optimizer.step()
    momentum = optimizer.state[idle]["momentum"].clone()
    idle.grad = None
    value = idle.item()
    optimizer.step()
    assert idle.item() == value
    assert torch.equal(optimizer.state[idle]["momentum"], momentum)
    assert all(p.grad is None for p in (idle,))


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("first_step", ["zero", "gradient"])
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.3}, {"maximize": True, "weight_decay": 0.3}])
def test_gradients_are_not_modified_nor_kept(foreach, first_step, options):
    params = make_params()
    optimizer = CompositeMomentum(params, 0.1, 0.5, first_step=first_step, foreach=foreach, **options)
    for step in range(2):
        set_gradients(params, step)
        before = [p.grad.clone() for p in params]
        optimizer.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(params, before, strict=True))
        kept = [optimizer.state[p]["momentum"].clone() for p in params]
        for p in params:
            p.grad.fill_(math.nan)  # nor may the momentum be the gradient itself
        assert all(torch.equal(optimizer.state[p]["momentum"], v) for p, v in zip(params, kept, strict=True))


def test_steps_do_not_build_a_graph():
    params = make_params()
    optimizer = CompositeMomentum(params, 0.1)
    set_gradients(params, 0)
    optimizer.step()
    assert all(p.is_leaf and p.requires_grad for p in params)
    assert not any(optimizer.state[p]["momentum"].requires_grad for p in params)


def test_trains_a_network_in_a_plain_loop():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 3, generator=generator)
    y = x @ torch.tensor([[1.0], [-2.0], [0.5]])
    net = nn.Linear(3, 1)
    nn.init.zeros_(net.weight)
    nn.init.zeros_(net.bias)
    optimizer = CompositeMomentum(net.parameters(), lr=0.1, beta=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(net(x), y)
        loss.backward()
        optimizer.step()
    assert loss.item() < 1e-6
