"""States of torch.optim.SGD, taken over."""

from __future__ import annotations

import warnings

import pytest
import torch
from optimizers import make_params, set_gradients

from metamom import CompositeMomentum


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.9},
        {"momentum": 0.9, "dampening": 0.9},
        {"momentum": 0.9, "dampening": 0.5},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.7, "weight_decay": 0.1},
        {"momentum": 0.0},
        {"momentum": 0.0, "weight_decay": 0.1, "maximize": True},
        {"momentum": 0.5, "maximize": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("moved", [0, 1, 5])
def test_the_steps_after_it_are_sgds(options, moved):
    moved = max(moved, int(options.get("dampening") == 0.5))  # its first step is refused, see below
    params = make_params(torch.float64)
    sgd = torch.optim.SGD(params, 0.01, **options)
    for step in range(moved):
        set_gradients(params, step)
        sgd.step()
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    ours = CompositeMomentum(twins, lr=123.0)
    ours.load_state_dict(sgd.state_dict())
    for step in range(moved, moved + 6):
        for group in (params, twins):
            set_gradients(group, step)
        sgd.step()
        ours.step()
        for p, q in zip(params, twins, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_a_fused_nesterov_state():
    """There is no such kernel here: the steps are the same without it."""
    params, twins = make_params(torch.float64), make_params(torch.float64)
    sgd = torch.optim.SGD(params, 0.01, momentum=0.9, nesterov=True, fused=True)
    ours = CompositeMomentum(twins, lr=123.0)
    ours.load_state_dict(sgd.state_dict())
    for step in range(3):
        for group, optimizer in ((params, sgd), (twins, ours)):
            set_gradients(group, step)
            optimizer.step()
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dampening", [0.0, 0.9])
@pytest.mark.parametrize(
    "schedule",
    [
        lambda optimizer, last: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1 / (1 + k), last),
        lambda optimizer, last: torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5, last),
        lambda optimizer, last: torch.optim.lr_scheduler.OneCycleLR(
            optimizer, 0.05, total_steps=8, cycle_momentum=False, last_epoch=last
        ),
    ],
    ids=["LambdaLR", "StepLR", "OneCycleLR"],
)
def test_a_schedule_goes_on(schedule, dampening):
    """A scheduler made with ``last_epoch`` starts from the step sizes in the group, which change with its lr."""
    params = make_params(torch.float64)
    sgd = torch.optim.SGD(params, 0.01, momentum=0.9, dampening=dampening)
    whole = schedule(sgd, -1)

    def step(optimizer, group, scheduler, number):
        set_gradients(group, number)
        optimizer.step()
        scheduler.step()

    for number in range(3):
        step(sgd, params, whole, number)
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    ours = CompositeMomentum(twins, lr=123.0)
    ours.load_state_dict(sgd.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its first step is in its constructor, before the optimizer's
        rest = schedule(ours, whole.last_epoch - 1)
    for number in range(3, 7):
        step(sgd, params, whole, number)
        step(ours, twins, rest, number)
        for p, q in zip(params, twins, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "moved", "message"),
    [
        ({"momentum": 0.9, "dampening": 0.5}, 0, r"dampening=0\.5 and momentum=0\.9 in group 0, and parameters that"),
        ({"momentum": 1.0}, 1, r"momentum=1\.0 and dampening=0 in group 0: .* only for 0 <= momentum < 1"),
        ({"momentum": 0.9, "dampening": 1.0}, 1, r"dampening=1\.0 in group 0"),
    ],
)
def test_states_without_an_equivalent_are_refused(options, moved, message):
    params = make_params()
    sgd = torch.optim.SGD(params, 0.01, **options)
    for step in range(moved):
        set_gradients(params, step)
        sgd.step()
    ours = CompositeMomentum(params, lr=0.5)
    before = ours.state_dict()
    with pytest.raises(ValueError, match=message):
        ours.load_state_dict(sgd.state_dict())
    assert ours.state_dict() == before


@pytest.mark.parametrize("other", [torch.optim.Adam, torch.optim.RMSprop, torch.optim.LBFGS])
def test_a_state_of_another_optimizer_is_refused(other):
    params = make_params()
    with pytest.raises(ValueError, match=r"CompositeMomentum lacks beta.* Only states of Comp.* and .*SGD"):
        CompositeMomentum(params, lr=0.1).load_state_dict(other(params).state_dict())


def test_loaded_states_are_copies():
    """Stepping one optimizer must not move the other's momentum (pytorch issue 196083)."""
    for make in (
        lambda p: CompositeMomentum(p, 0.1, 0.5),
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.5, dampening=0.5),
    ):
        params, twins = make_params(), make_params()
        first, second = make(params), CompositeMomentum(twins, 0.1, 0.5)
        set_gradients(params, 0)
        first.step()
        second.load_state_dict(first.state_dict())
        kept = [second.state[p]["momentum"].clone() for p in twins]
        set_gradients(params, 1)
        first.step()
        assert all(torch.equal(second.state[p]["momentum"], v) for p, v in zip(twins, kept, strict=True))


def test_hooks_after_loading_see_copies_and_may_keep_things_in_the_state():
    params = make_params()
    first, second = CompositeMomentum(params, 0.1), CompositeMomentum(params, 0.1)
    set_gradients(params, 0)
    first.step()

    def scale(optimizer: torch.optim.Optimizer) -> None:
        for p in params:
            optimizer.state[p]["momentum"].mul_(2)
        optimizer.state["scaled"] = True

    second.register_load_state_dict_post_hook(scale)
    second.load_state_dict(first.state_dict())
    assert second.state["scaled"]
    for p in params:
        assert torch.equal(second.state[p]["momentum"], 2 * first.state[p]["momentum"])
