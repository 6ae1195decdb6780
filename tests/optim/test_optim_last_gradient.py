"""beta = 1: the momentum is the last gradient, whatever becomes of that gradient, though it may never be copied."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from cases import loop_over
from torch import Tensor, nn

from metamom import CompositeMomentum

BETAS = [1.0, 1.0, 0.5, 1.0, 0.25, 0.25, 1.0, 0.5]  # a smaller beta after 1 shows what the momentum was
SHAPES = [(80, 80), (3,), (), (2, 0)]  # one large enough to share memory


def values(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def set_new(params: list[nn.Parameter], gs: list[Tensor]) -> None:
    for p, g in zip(params, gs, strict=True):
        p.grad = g.clone()


def set_in_place(params: list[nn.Parameter], gs: list[Tensor]) -> None:
    for p, g in zip(params, gs, strict=True):
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        p.grad.zero_().add_(g)


def set_by_backward(params: list[nn.Parameter], gs: list[Tensor]) -> None:
    for p in params:
        p.grad = None
    sum((p * g).sum() for p, g in zip(params, gs, strict=True)).backward()


def set_accumulated(params: list[nn.Parameter], gs: list[Tensor]) -> None:
    for p in params:
        p.grad = None
    for _ in range(2):
        sum((p * g / 2).sum() for p, g in zip(params, gs, strict=True)).backward()


def set_as_views(params: list[nn.Parameter], gs: list[Tensor]) -> None:
    """Parts of one buffer that stays, as DDP's ``gradient_as_bucket_view`` makes them."""
    if params[0].grad is None:
        flat = torch.zeros(sum(p.numel() for p in params))
        for p, piece in zip(params, flat.split([p.numel() for p in params]), strict=True):
            p.grad = piece.view_as(p)
    set_in_place(params, gs)


def set_from_numpy(params: list[nn.Parameter], gs: list[Tensor]) -> None:
    for p, g in zip(params, gs, strict=True):
        p.grad = torch.from_numpy(np.array(g.numpy()))


def set_expanded(params: list[nn.Parameter], gs: list[Tensor]) -> None:
    for p, g in zip(params, gs, strict=True):
        p.grad = g.flatten()[:1].expand(p.numel()).view(p.shape) if p.numel() else g.clone()


def set_in_shared_memory(params: list[nn.Parameter], gs: list[Tensor]) -> None:
    for p, g in zip(params, gs, strict=True):
        p.grad = g.clone().share_memory_() if g.numel() else g.clone()


def leave(params: list[nn.Parameter]) -> None:
    """Nothing happens to the gradients."""


def drop(params: list[nn.Parameter]) -> None:
    for p in params:
        p.grad = None


def overwrite(params: list[nn.Parameter]) -> None:
    for p in params:
        p.grad.fill_(math.nan)


def overwrite_through_numpy(params: list[nn.Parameter]) -> None:
    for p in params:
        p.grad.numpy()[...] = math.nan


SETTERS = [set_new, set_in_place, set_by_backward, set_accumulated, set_as_views, set_from_numpy]
FATES = [leave, drop, overwrite, overwrite_through_numpy]
OPTIONS = [{}, {"maximize": True}, {"weight_decay": 0.1}, {"nesterov": True}, {"normalize": True}, {"foreach": False}]


def check(set_gradients: Callable[..., None], fate: Callable[..., None], options: dict[str, object]) -> None:
    """Bit for bit the steps of one that copies, and the momentum after each of them is the last gradient."""
    params, twins = ([nn.Parameter(g) for g in values(100)] for _ in range(2))
    ours, copying = (CompositeMomentum(ps, 0.1, **options) for ps in (params, twins))
    for step, beta in enumerate(BETAS):
        set_gradients(params, values(step))
        for p, twin in zip(params, twins, strict=True):
            twin.grad = p.grad.clone()
        ours.param_groups[0]["beta"] = beta
        # the nearest float below 1 takes the other way, and rounds to the same v in float32
        copying.param_groups[0]["beta"] = beta if beta < 1 else math.nextafter(1, 0)
        ours.step()
        copying.step()
        fate(params)
        for p, twin in zip(params, twins, strict=True):
            torch.testing.assert_close(p.detach(), twin.detach(), rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(ours.state[p]["momentum"], copying.state[twin]["momentum"], rtol=1e-6, atol=1e-6)


@loop_over(fate=FATES, options=OPTIONS)
@pytest.mark.parametrize("set_gradients", SETTERS)
def test_the_momentum_is_the_last_gradient(set_gradients, fate, options):
    check(set_gradients, fate, options)


@loop_over(options=OPTIONS)
@pytest.mark.parametrize("set_gradients", [set_expanded, set_in_shared_memory])
def test_gradients_in_other_memory(set_gradients, options):
    check(set_gradients, leave, options)


def test_a_numpy_array_taken_before_the_step_does_not_reach_the_momentum():
    w = nn.Parameter(torch.zeros(80, 80))
    w.grad = torch.ones(80, 80)
    array = w.grad.numpy()
    optimizer = CompositeMomentum([w], 0.1, 1.0)
    optimizer.step()
    array[...] = 7
    assert torch.equal(optimizer.state[w]["momentum"], torch.ones(80, 80))


def test_a_large_gradient_is_not_copied_and_sgds_step_is_taken():
    w, twin = (nn.Parameter(torch.ones(80, 80)) for _ in range(2))
    ours, sgd = CompositeMomentum([w], 0.1, 1.0), torch.optim.SGD([twin], 0.1)
    for step in range(3):
        w.grad, twin.grad = values(step)[0], values(step)[0]
        ours.step()
        sgd.step()
        assert torch.equal(w, twin)
        assert torch._C._is_cow_tensor(ours.state[w]["momentum"])  # until one of the two is written to
        ours.zero_grad()


def through_a_file(x: Tensor) -> Tensor:
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), through_a_file])
def test_states_with_shared_memory_are_saved_and_loaded(duplicate):
    w = nn.Parameter(torch.zeros(80, 80))
    w.grad = values(0)[0]
    optimizer = CompositeMomentum([w], 0.1, 1.0)
    optimizer.step()
    saved = duplicate(optimizer.state_dict()["state"][0]["momentum"])
    w.grad.zero_()
    assert torch.equal(saved, values(0)[0])
    assert torch.equal(optimizer.state[w]["momentum"], values(0)[0])
