"""The step by which `torch.distributed.checkpoint` makes a new optimizer's state is not the first step."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from metamom import CompositeMomentum

OPTIONS: list[dict[str, Any]] = [
    {"first_step": first_step, "weight_decay": decay, "fused": fused, "beta": beta}
    for first_step, decay, fused, beta in itertools.product(("zero", "gradient"), (0.0, 0.3), (None, True), (0.1, 1.0))
]
OPTIONS += [{"first_step": "gradient", "nesterov": True}, {"first_step": "gradient", "foreach": False}]
OPTIONS += [{"first_step": "gradient", "lr": torch.tensor(0.1)}, {"weight_decay": 0.3, "normalize": True}]


def trained(model: nn.Module, optimizer: CompositeMomentum, steps: int = 3) -> Tensor:
    for step in range(steps):
        for i, p in enumerate(model.parameters()):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + i), dtype=p.dtype)
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def new(options: dict[str, Any]) -> tuple[nn.Module, CompositeMomentum]:
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    return model, CompositeMomentum(model.parameters(), **{"lr": 0.1, **options})


@pytest.mark.parametrize("options", OPTIONS)
def test_reading_the_state_of_a_new_optimizer_changes_nothing(options):
    expected = trained(*new(options))
    model, optimizer = new(options)
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    assert all(not each["momentum"].any() for each in state["state"].values())
    assert torch.equal(trained(model, optimizer), expected)

    model, optimizer = new(options)  # a checkpoint of step 0 is loaded
    set_optimizer_state_dict(model, optimizer, state)
    assert torch.equal(trained(model, optimizer), expected)


@pytest.mark.parametrize("options", OPTIONS)
def test_a_later_state_is_loaded_as_it_is(options):
    model, optimizer = new(options)
    trained(model, optimizer, 2)
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    other, continued = new(options)
    other.load_state_dict(model.state_dict())
    set_optimizer_state_dict(other, continued, state)
    assert torch.equal(trained(other, continued), trained(model, optimizer))


def test_parameters_that_join_later_start_with_their_first_gradient():
    (model, optimizer), (alone, expected) = new({"first_step": "gradient"}), new({"first_step": "gradient"})
    get_optimizer_state_dict(model, optimizer)
    for each, its in ((model, optimizer), (alone, expected)):
        for step in range(3):
            each.weight.grad = torch.full_like(each.weight, step + 1.0)
            each.bias.grad = torch.full_like(each.bias, step + 1.0) if step else None
            its.step()
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_copy_of_a_new_optimizer_starts_as_it_does():
    model, optimizer = new({"first_step": "gradient"})
    get_optimizer_state_dict(model, optimizer)
    pair = copy.deepcopy((model, optimizer))
    assert torch.equal(trained(*pair), trained(model, optimizer))


def test_a_step_of_size_zero_with_a_gradient_is_a_step():
    """v_0 = g_0 = 2, then v_1 = 0.5 * 2 + 0.5 * 4 = 3."""
    w = nn.Parameter(torch.zeros(1))
    optimizer = CompositeMomentum([w], lr=0.0, beta=0.5, first_step="gradient")
    w.grad = torch.tensor([2.0])
    optimizer.step()
    assert w.item() == 0
    optimizer.param_groups[0]["lr"] = 1.0
    w.grad = torch.tensor([4.0])
    optimizer.step()
    assert w.item() == -3
