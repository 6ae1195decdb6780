"""torch's own tests of optimizers, in our words, over `CompositeMomentum`: state dicts, copies and hooks.

See test_torch_conformance.py for which of torch's tests these are.
"""

from __future__ import annotations

import io
import itertools
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch_infos import Affine, assert_same_params, every_fused_info, every_info, options_of

from metamom import CompositeMomentum

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
NAMED = list(itertools.product((False, True), repeat=2))


def assert_equal(ours: Any, theirs: Any) -> None:
    """Nested dicts and lists, with tensors in them."""
    assert type(ours) is type(theirs)
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert_equal(ours[key], theirs[key])
    elif isinstance(ours, list):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert_equal(a, b)
    elif isinstance(ours, Tensor):
        assert torch.equal(ours, theirs)
    else:
        assert ours == theirs


def without_names(state: dict[str, Any]) -> dict[str, Any]:
    groups = [{k: v for k, v in group.items() if k != "param_names"} for group in state["param_groups"]]
    return {**state, "param_groups": groups}


def moved(
    info: Any, kwargs: dict[str, Any], steps: int = 3, *, named: bool = False
) -> tuple[Affine, CompositeMomentum]:
    problem = Affine((2, 3))
    optimizer = info.optim_cls(problem.named(named), **kwargs)
    for _ in range(steps):
        problem.backward()
        optimizer.step()
    return problem, optimizer


@pytest.mark.parametrize(("first", "second"), NAMED)
@every_info
def test_state_dict_deterministic(info, first, second):
    for kwargs in options_of(info, skip=("differentiable",)):
        problem, optimizer = moved(info, kwargs, 10, named=first)
        twin = problem.copy()
        loaded = info.optim_cls(twin.named(second), **kwargs)
        loaded.load_state_dict(deepcopy(optimizer.state_dict()))
        for _ in range(10):
            for each, stepping in ((problem, optimizer), (twin, loaded)):
                each.backward()
                stepping.step()
            assert_same_params(problem.params, twin.params, rtol=0, atol=0)
        assert_equal(without_names(optimizer.state_dict()), without_names(loaded.state_dict()))
        loaded.param_groups.extend(loaded.param_groups)  # parameters that come twice look the same in the state
        groups = [without_names(each.state_dict())["param_groups"][-1] for each in (optimizer, loaded)]
        assert_equal(*groups)


@every_info
def test_can_load_older_state_dict(info):
    for kwargs in options_of(info, skip=("differentiable",)):
        problem, optimizer = moved(info, kwargs)
        state = deepcopy(optimizer.state_dict())
        for group, flag in itertools.product(state["param_groups"], info.not_og_supported_flags):
            group.pop(flag, None)
        optimizer.load_state_dict(state)
        problem.backward()
        optimizer.step()
        assert set(optimizer.param_groups[0]) >= set(info.not_og_supported_flags)


@pytest.mark.parametrize(("first", "second"), NAMED)
@every_info
def test_can_load_from_to_named_state_dict(info, first, second):
    for kwargs in options_of(info, skip=("differentiable",)):
        problem, optimizer = moved(info, kwargs, named=first)
        loaded = info.optim_cls(problem.named(second), **kwargs)
        loaded.load_state_dict(deepcopy(optimizer.state_dict()))
        problem.backward()
        loaded.step()
        names = loaded.state_dict()["param_groups"][0].get("param_names")
        assert names == (["name0", "name1"] if first or second else None)


@pytest.mark.parametrize("named", [False, True])
@every_info
def test_save_load_equality_with_weights_only(info, named):
    for kwargs in options_of(info, skip=("differentiable",)):
        _, optimizer = moved(info, kwargs, named=named)
        state, file = optimizer.state_dict(), io.BytesIO()
        torch.save(state, file)
        for weights_only in (False, True):
            file.seek(0)
            assert_equal(torch.load(file, weights_only=weights_only), state)


@every_info
def test_load_nontensor_step(info):
    """There is no step counter: the state has nothing but tensors, and can be loaded and stepped from as it is."""
    for kwargs in options_of(info, skip=("differentiable",)):
        problem, optimizer = moved(info, kwargs)
        state = deepcopy(optimizer.state_dict())
        assert all("step" not in each for each in state["state"].values())
        optimizer.load_state_dict(state)
        problem.backward()
        optimizer.step()


@pytest.mark.parametrize("device", DEVICES)
@every_info
def test_state_dict_with_cuda_params(info, device):
    """A state from the CPU goes to the parameters' device, and is not itself changed."""
    for kwargs in options_of(info, skip=("differentiable",)):
        _, optimizer = moved(info, kwargs)
        params = optimizer.param_groups[0]["params"]
        there = [nn.Parameter(p.detach().clone().to(device)) for p in params]
        loaded = info.optim_cls(there, **kwargs)
        state = deepcopy(optimizer.state_dict())
        loaded.load_state_dict(state)
        assert_equal(state, optimizer.state_dict())
        for _ in range(5):
            for p, q in zip(params, there, strict=True):
                p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
            optimizer.step()
            loaded.step()
            assert_same_params(params, [q.cpu() for q in there])
            assert all(loaded.state[q]["momentum"].device == q.device for q in there)


@pytest.mark.parametrize("device", DEVICES)
@every_fused_info
def test_cpu_load_state_dict(info, device):
    """A fused optimizer goes on from a state that was moved to the CPU. There is no capturable one."""
    for given in info.optim_inputs_func(device="cpu"):
        p = nn.Parameter(torch.tensor([0.1, 0.2]))
        optimizer = info.optim_cls([p], **given.kwargs)
        p.grad = torch.ones_like(p)
        optimizer.step()
        state = deepcopy(optimizer.state_dict())
        state["param_groups"][0]["fused"] = True
        there = nn.Parameter(p.detach().clone().to(device))
        loaded = info.optim_cls([there], **given.kwargs, fused=True)
        loaded.load_state_dict(state)
        for q, each in ((p, optimizer), (there, loaded)):
            q.grad = torch.full_like(q, 2.0)
            each.step()
        assert_same_params([p], [there.cpu()])


def mark(optimizer: CompositeMomentum) -> None:
    optimizer.state["test"] = 1


def unmark(optimizer: CompositeMomentum, state: dict[str, Any]) -> dict[str, Any]:
    state["marked"] = state["state"].pop("test", None) is not None
    return state


@every_info
def test_state_dict_pre_hook(info):
    for kwargs in options_of(info):
        optimizer = info.optim_cls(Affine().params, **kwargs)
        optimizer.register_state_dict_pre_hook(mark)
        assert optimizer.state_dict()["state"]["test"] == 1


@every_info
def test_state_dict_post_hook(info):
    for kwargs in options_of(info):
        optimizer = info.optim_cls(Affine().params, **kwargs)
        optimizer.register_state_dict_post_hook(unmark)
        assert optimizer.state_dict()["marked"] is False


@every_info
def test_state_dict_pre_post_hook(info):
    for kwargs in options_of(info):
        optimizer = info.optim_cls(Affine().params, **kwargs)
        optimizer.register_state_dict_pre_hook(mark)
        optimizer.register_state_dict_post_hook(unmark)
        state = optimizer.state_dict()
        assert state["marked"] is True
        assert "test" not in state["state"]


def set_two(optimizer: CompositeMomentum, state: dict[str, Any]) -> None:
    state["param_groups"][0]["lr"] = 0.002


def with_three(optimizer: CompositeMomentum, state: dict[str, Any]) -> dict[str, Any]:
    state = deepcopy(state)
    state["param_groups"][0]["lr"] = 0.003
    return state


def note_three(optimizer: CompositeMomentum) -> None:
    optimizer.state["three"] = bool(optimizer.param_groups[0]["lr"] == 0.003)


@every_info
def test_load_state_dict_pre_hook_and_prepend(info):
    for kwargs in options_of(info):
        optimizer = info.optim_cls(Affine().params, **kwargs)
        state = optimizer.state_dict()
        optimizer.register_load_state_dict_pre_hook(set_two)
        optimizer.load_state_dict(state)
        assert optimizer.param_groups[0]["lr"] == 0.002
        optimizer.register_load_state_dict_pre_hook(with_three, prepend=True)  # so that the other one has the last word
        optimizer.load_state_dict(state)
        assert optimizer.param_groups[0]["lr"] == 0.002


@pytest.mark.parametrize("before", [False, True], ids=["post", "pre and post"])
@every_info
def test_load_state_dict_post_hook(info, before):
    """With ``before``, torch's test_load_state_dict_pre_post_hook."""
    for kwargs in options_of(info):
        optimizer = info.optim_cls(Affine().params, **kwargs)
        if before:
            optimizer.register_load_state_dict_pre_hook(with_three)
        optimizer.register_load_state_dict_post_hook(note_three)
        optimizer.load_state_dict(optimizer.state_dict())
        assert optimizer.state["three"] is before


@pytest.mark.parametrize("place", ["pre", "post"])
@every_info
def test_step_pre_and_post_hook(info, place):
    """torch's test_step_pre_hook and test_step_post_hook."""
    for kwargs in options_of(info):
        optimizer = info.optim_cls([torch.ones(2)], **kwargs)
        calls: list[Any] = []
        handle = getattr(optimizer, f"register_step_{place}_hook")(lambda *given, calls=calls: calls.append(given))
        optimizer.step()
        optimizer.step()
        assert [each for each, _, _ in calls] == [optimizer] * 2
        handle.remove()
        optimizer.step()
        assert len(calls) == 2


@every_info
def test_step_all_hooks(info):
    for kwargs in options_of(info):
        params = [torch.ones(2)]
        ours, sgd = info.optim_cls(params, **kwargs), torch.optim.SGD(params, 0.1)
        order: list[str] = []
        handles = [
            register_optimizer_step_pre_hook(lambda *_, order=order: order.append("global pre")),
            register_optimizer_step_post_hook(lambda *_, order=order: order.append("global post")),
        ]
        for each in (ours, sgd):
            handles.append(each.register_step_pre_hook(lambda *_, order=order: order.append("pre")))
            handles.append(each.register_step_post_hook(lambda *_, order=order: order.append("post")))
        try:
            for each in (ours, sgd, ours):
                each.step()
        finally:
            for handle in handles:
                handle.remove()
        assert order == ["global pre", "pre", "post", "global post"] * 3
        ours.step()
        assert len(order) == 12


@every_info
def test_deepcopy_copies_all_public_attrs(info):
    for kwargs in options_of(info, skip=("differentiable",)):
        _, optimizer = moved(info, kwargs)
        ours, theirs = ({k for k in vars(each) if k[0] != "_"} for each in (optimizer, deepcopy(optimizer)))
        assert ours == theirs
