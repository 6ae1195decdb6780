"""Nesterov's form, decoupled weight decay, the fused kernel, and options that are tensors."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from optimizers import assert_same, make_params, run, scalar, set_gradients, step_once
from torch import Tensor, nn
from torch.optim import lr_scheduler

from metamom import CompositeMomentum


def assert_near(ours: list[list[Tensor]], theirs: list[list[Tensor]], atol: float) -> None:
    for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=atol, msg=lambda m, step=step: f"step {step}: {m}")
    assert not torch.equal(ours[0][0], ours[-1][0])


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.01}, {"maximize": True}], ids=["plain", "decay", "max"])
@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_nesterov_from_zero_is_sgds(beta, options, foreach):
    lr = 0.02 if not options.get("maximize") else 0.001
    ours = run(lambda p: CompositeMomentum(p, lr, beta, nesterov=True, foreach=foreach, **options), dtype=torch.float64)
    theirs = run(
        lambda p: torch.optim.SGD(p, lr * beta, momentum=1 - beta, nesterov=True, **options), dtype=torch.float64
    )
    assert_near(ours, theirs, 1e-12)


def test_nesterov_from_the_first_gradient_by_hand():
    """v_0 = g_0 = 4; then v_1 = 0.75 * 4 + 0.25 * 8 = 5, and the step is 0.75 * 5 + 0.25 * 8 = 5.75."""
    w = scalar(0.0)
    optimizer = CompositeMomentum([w], lr=1.0, beta=0.25, first_step="gradient", nesterov=True)
    step_once(optimizer, 4.0)
    assert w.item() == -4.0
    step_once(optimizer, 8.0)
    assert w.item() == -4.0 - 5.75
    assert optimizer.state[w]["momentum"].item() == 5.0


@pytest.mark.parametrize("foreach", [False, True])
def test_decoupled_weight_decay_stays_out_of_the_average(foreach):
    lr, decay, beta = 0.05, 0.3, 0.2
    params, twins = make_params(torch.float64), make_params(torch.float64)
    optimizer = CompositeMomentum(params, lr, beta, weight_decay=decay, decoupled_weight_decay=True, foreach=foreach)
    v = [torch.zeros_like(p) for p in twins]
    for step in range(8):
        set_gradients(params, step)
        set_gradients(twins, step)
        optimizer.step()
        for i, twin in enumerate(twins):
            v[i] = (1 - beta) * v[i] + beta * twin.grad
            twin.data = (1 - lr * decay) * twin.data - lr * v[i]
        for p, twin in zip(params, twins, strict=True):
            torch.testing.assert_close(p, twin, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("first_step", ["zero", "gradient"])
@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize(
    "options",
    [{}, {"weight_decay": 0.01}, {"maximize": True}, {"weight_decay": 0.1, "decoupled_weight_decay": True}],
    ids=["plain", "decay", "max", "decoupled"],
)
def test_the_fused_kernel_takes_the_same_steps(options, beta, first_step):
    lr = 0.02 if not options.get("maximize") else 0.001
    common = {"lr": lr, "beta": beta, "first_step": first_step, **options}
    fused = run(lambda p: CompositeMomentum(p, fused=True, **common), dtype=torch.float64)
    assert_near(fused, run(lambda p: CompositeMomentum(p, **common), dtype=torch.float64), 1e-11)


def test_the_fused_kernel_keeps_the_momentum_for_a_later_beta():
    params, twins = [scalar(1.0)], [scalar(1.0)]
    fused = CompositeMomentum(params, 0.1, 1.0, fused=True)
    plain = CompositeMomentum(twins, 0.1, 1.0)
    for beta, g in ((1.0, 3.0), (0.5, 1.0), (1.0, -2.0), (0.25, 4.0)):
        for optimizer in (fused, plain):
            optimizer.param_groups[0]["beta"] = beta
            step_once(optimizer, g)
        assert params[0].item() == pytest.approx(twins[0].item(), abs=1e-15)
        momenta = [o.state[p]["momentum"].item() for o, (p,) in ((fused, params), (plain, twins))]
        assert momenta[0] == pytest.approx(momenta[1], abs=1e-15)


@pytest.mark.parametrize("first_step", ["zero", "gradient"])
def test_the_fused_kernel_scales_gradients_and_skips_infinite_ones(first_step):
    """As `torch.amp.GradScaler` has it: after an overflow, the next finite gradient is the first."""
    w, twin = scalar(1.0, torch.float32), scalar(1.0, torch.float32)
    scaled = CompositeMomentum([w], 0.1, 0.25, first_step=first_step, fused=True)
    plain = CompositeMomentum([twin], 0.1, 0.25, first_step=first_step)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1000)
    for factor in (math.inf, 1.0, 1.0, math.inf, 2.0):
        scaled.zero_grad()
        scaler.scale(w * 3.0 * factor).backward()
        scaler.step(scaled)
        scaler.update()
        if math.isfinite(factor):
            step_once(plain, 3.0 * factor)
        assert w.item() == pytest.approx(twin.item(), abs=1e-6)
    assert w.item() < 1


@pytest.mark.parametrize("change", ["load", "add", "pickle"])
def test_gradients_are_unscaled_once_whatever_is_loaded_or_added(change):
    """GradScaler leaves the division to an optimizer that is fused as a whole, and to no other."""
    w, late = scalar(1.0, torch.float32), scalar(1.0, torch.float32)
    optimizer = CompositeMomentum([w], 0.1, 1.0, fused=True)
    if change == "load":
        optimizer.load_state_dict(CompositeMomentum([scalar()], 0.1, 1.0).state_dict())
    elif change == "add":
        optimizer.add_param_group({"params": [late], "fused": False})
    else:
        optimizer = pickle.loads(pickle.dumps(optimizer))
        w = optimizer.param_groups[0]["params"][0]
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(w * 3.0 + late * 2.0).backward()
    scaler.step(optimizer)
    assert w.item() == pytest.approx(1 - 0.1 * 3)
    assert late.item() == pytest.approx(1 - 0.1 * 2 if change == "add" else 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fused": True, "foreach": True}, "fused=True has no kernel with foreach=True"),
        ({"fused": True, "differentiable": True}, "fused=True has no kernel with differentiable=True"),
        ({"fused": True, "normalize": True}, "fused=True has no kernel with normalize=True"),
        ({"fused": True, "nesterov": True}, "fused=True has no kernel with nesterov=True"),
        ({"differentiable": True, "foreach": True}, "one by one: leave foreach=True out"),
    ],
)
def test_options_that_exclude_each_other(options, message):
    with pytest.raises(ValueError, match=message):
        CompositeMomentum([scalar()], 0.1, **options)
    with pytest.raises(ValueError, match=message):
        CompositeMomentum([{"params": [scalar()], **options}], 0.1)


def test_the_fused_kernel_refuses_what_it_cannot_take():
    with pytest.raises(TypeError, match=r"fused=True needs floating-point parameters .*; got one of dtype .*complex64"):
        CompositeMomentum([nn.Parameter(torch.zeros(2, dtype=torch.complex64))], 0.1, fused=True)
    deferred = nn.Parameter(torch.zeros(2, device="meta"))  # it may get memory before its first step, as in torch
    deferred.grad = torch.zeros_like(deferred)
    with pytest.raises(TypeError, match=r"fused=True needs .* on meta"):
        CompositeMomentum([deferred], 0.1, fused=True).step()


def test_a_step_size_of_zero_moves_nothing_and_averages_on():
    still, moved = scalar(1.0), scalar(1.0)
    optimizer = CompositeMomentum([{"params": [still], "lr": 0.0}, {"params": [moved]}], lr=0.1, beta=0.5)
    step_once(optimizer, 2.0)
    assert (still.item(), moved.item()) == (1.0, 0.9)
    assert optimizer.state[still]["momentum"].item() == 1.0
    step_once(CompositeMomentum([moved], lr=0.0), 1.0)
    assert moved.item() == 0.9


def test_normalised_steps_on_the_meta_device():
    p = nn.Parameter(torch.zeros(3, device="meta"))
    p.grad = torch.zeros_like(p)
    optimizer = CompositeMomentum([p], 0.1, normalize=True)
    optimizer.step()
    assert optimizer.state[p]["momentum"].shape == (3,)


@pytest.mark.parametrize("options", [{}, {"nesterov": True}, {"normalize": True}, {"weight_decay": 0.1}])
@pytest.mark.parametrize("first_step", ["zero", "gradient"])
def test_tensor_options_are_read_as_numbers(first_step, options):
    common = {"first_step": first_step, **options}
    numbers = run(lambda p: CompositeMomentum(p, 0.02, 0.25, **common), 10)
    if "weight_decay" in common:
        common["weight_decay"] = torch.tensor(common["weight_decay"], dtype=torch.float64)
    assert_same(run(lambda p: CompositeMomentum(p, torch.tensor(0.02), torch.tensor(0.25), **common), 10), numbers)


@pytest.mark.parametrize(
    "options",
    [{}, {"nesterov": True}, {"maximize": True}, {"decoupled_weight_decay": True}],
    ids=["plain", "nesterov", "maximize", "decoupled"],
)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("first_step", ["zero", "gradient"])
def test_three_steps_can_be_differentiated(first_step, normalize, options):
    """With respect to the start, the step size, beta and the weight decay, against finite differences."""
    common = {"first_step": first_step, "normalize": normalize, "differentiable": True, **options}

    def end(w: Tensor, lr: Tensor, beta: Tensor, decay: Tensor) -> Tensor:
        params = [w[:2].clone(), w[2:].clone()]
        optimizer = CompositeMomentum(params, lr, beta, weight_decay=decay, **common)
        for _ in range(3):
            for p in params:
                at = p.clone()  # the step changes p in place, and autograd needs what it was
                p.grad = torch.sin(at) + at**3
            optimizer.step()
        return torch.cat(params)

    w = torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64, requires_grad=True)
    options = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.1, 0.3, 0.2)]
    assert torch.autograd.gradcheck(end, (w, *options))


def cycled(make, schedule, steps: int = 20) -> tuple[list[list[Tensor]], list[float]]:
    """The parameters and the momentum of every step."""
    params = make_params(torch.float64)
    optimizer = make(params)
    scheduler = schedule(optimizer)
    trace, momenta = [], []
    for step in range(steps):
        set_gradients(params, step)
        optimizer.step()
        trace.append([p.detach().clone() for p in params])
        group = optimizer.param_groups[0]
        momenta.append(1 - group["beta"] if "beta" in group else group["momentum"])
        scheduler.step()
    return trace, momenta


@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
        lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=20, three_phase=True, base_momentum=0.5),
        lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=4),
        lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=4, mode="exp_range", gamma=0.9, base_momentum=0.3),
    ],
    ids=["one cycle", "three phases", "cyclic", "exponential"],
)
def test_schedules_that_cycle_the_momentum_cycle_beta(schedule):
    """The momenta are those of SGD, and the steps those of SGD with a dampening that follows its momentum."""
    ours, momenta = cycled(lambda p: CompositeMomentum(p, 0.01, 0.1, first_step="gradient"), schedule)
    _, expected = cycled(lambda p: torch.optim.SGD(p, 0.01, momentum=0.9), schedule)
    assert momenta == pytest.approx(expected, abs=1e-12)
    assert len(set(momenta)) > 3
    twins = make_params(torch.float64)
    sgd = torch.optim.SGD(twins, 0.01, momentum=0.9, dampening=0.9)
    scheduler = schedule(sgd)
    for step in range(20):
        set_gradients(twins, step)
        sgd.param_groups[0]["dampening"] = sgd.param_groups[0]["momentum"]
        sgd.step()
        scheduler.step()
        for p, twin in zip(ours[step], twins, strict=True):
            torch.testing.assert_close(p, twin.detach(), rtol=1e-12, atol=1e-12)
