"""Steps on parameters that lie on two processes; prints OK where they equal the whole ones.

One process goes on with what two have stored.
"""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from metamom import BiasedAccumulator, CompositeMomentum

OPTIONS = [
    {},
    {"normalize": True},
    {"normalize": True, "foreach": True},
    {"nesterov": True, "first_step": "gradient"},
    {"beta": 1.0, "foreach": True},
    {"weight_decay": 0.1, "decoupled_weight_decay": True},
    {"fused": True},
    {"beta": 1.0, "maximize": True, "weight_decay": 0.1},
]
STORED = [StateDictOptions(), StateDictOptions(flatten_optimizer_state_dict=True)]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for k in steps:
        x = torch.randn(8, 5, generator=torch.Generator().manual_seed(k))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def assert_alike(sharded: nn.Module, plain: nn.Module, case: object) -> None:
    for p, q in zip(sharded.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(whole(p), q.detach(), rtol=0, atol=1e-6, msg=lambda m: f"{case}: {m}")


def sharded_by_fsdp(mesh) -> nn.Module:
    model = network()
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    return model


def sharded_by_layer(mesh) -> nn.Module:
    return parallelize_module(network(), mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


def check_steps(mesh) -> None:
    for make, options in itertools.product((sharded_by_fsdp, sharded_by_layer), OPTIONS):
        plain, model = network(), make(mesh)
        train(plain, CompositeMomentum(plain.parameters(), lr=0.1, **options), range(4))
        train(model, CompositeMomentum(model.parameters(), lr=0.1, **options), range(4))
        assert_alike(model, plain, (make.__name__, options))


def check_checkpoints(mesh) -> None:
    """Whole states, as torch.distributed.checkpoint takes and gives them, go on as without the break."""
    plain = network()
    train(plain, CompositeMomentum(plain.parameters(), lr=0.1), range(6))
    model = sharded_by_fsdp(mesh)
    optimizer = CompositeMomentum(model.parameters(), lr=0.1)
    train(model, optimizer, range(3))
    state = get_optimizer_state_dict(model, optimizer)
    fresh = CompositeMomentum(model.parameters(), lr=5.0)
    set_optimizer_state_dict(model, fresh, state)
    train(model, fresh, range(3, 6))
    assert_alike(model, plain, "checkpoint")


def check_states_of_step_0(mesh) -> None:
    """The state of an optimizer that has not made a step, stored and loaded: v_0 still is g_0."""
    for stored in (*STORED, StateDictOptions(full_state_dict=True)):
        plain, model = network(), sharded_by_fsdp(mesh)
        options = {"lr": 0.1, "first_step": "gradient", "weight_decay": 0.1}
        train(plain, CompositeMomentum(plain.parameters(), **options), range(3))
        state = get_optimizer_state_dict(model, CompositeMomentum(model.parameters(), **options), options=stored)
        optimizer = CompositeMomentum(model.parameters(), lr=5.0)
        set_optimizer_state_dict(model, optimizer, state, options=stored)
        train(model, optimizer, range(3))
        assert_alike(model, plain, ("step 0", stored))


def check_partial_sums(mesh) -> None:
    """Gradients of which each process has a summand, as layers over a part of a sequence have them."""
    for options in ({}, {"fused": True}, {"normalize": True}, {"foreach": True, "nesterov": True}):
        options = {"lr": 0.1, "first_step": "gradient", **options}
        weights = [nn.Parameter(distribute_tensor(torch.ones(3), mesh, [Replicate()])), nn.Parameter(torch.ones(3))]
        optimizers = [CompositeMomentum([w], **options) for w in weights]
        for k in range(3):
            mine = torch.randn(2, 3, generator=torch.Generator().manual_seed(k))
            weights[0].grad = DTensor.from_local(mine[mesh.get_local_rank()], mesh, [Partial()])
            weights[1].grad = mine.sum(0)
            for optimizer in optimizers:
                optimizer.step()
        torch.testing.assert_close(whole(weights[0]), weights[1].detach(), msg=lambda m: f"{options}: {m}")  # noqa: B023
        assert optimizers[0].state[weights[0]]["momentum"].placements == (Replicate(),)


def store(mesh, folder: Path) -> None:
    """Each process writes its part of a run's state after three steps, in both forms of the optimizer's."""
    model = sharded_by_fsdp(mesh)
    optimizer = CompositeMomentum(model.parameters(), lr=0.1, weight_decay=0.1)
    train(model, optimizer, range(3))
    for number, options in enumerate(STORED):
        weights, state = get_state_dict(model, optimizer, options=options)
        checkpoint.save({"model": weights, "optimizer": state}, checkpoint_id=folder / str(number))
        check_stored(sharded_by_fsdp(mesh), folder, number)


def check_stored(model: nn.Module, folder: Path, number: int) -> None:
    """A stored run goes on, on as many processes as there are, as one that has never stopped."""
    optimizer = CompositeMomentum(model.parameters(), lr=5.0)
    weights, state = get_state_dict(model, optimizer, options=STORED[number])
    checkpoint.load(
        {"model": weights, "optimizer": state},
        checkpoint_id=folder / str(number),
        no_dist=not distributed.is_initialized(),
    )
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state, options=STORED[number])
    train(model, optimizer, range(3, 6))
    plain = network()
    train(plain, CompositeMomentum(plain.parameters(), lr=0.1, weight_decay=0.1), range(6))
    assert_alike(model, plain, STORED[number])


def check_mixed(mesh) -> None:
    """A DTensor beside a plain tensor: v has the entries of ones, 8 of them."""
    for foreach, beta in itertools.product((True, False, None), (1.0, 0.5)):
        sharded = nn.Parameter(distribute_tensor(torch.zeros(2, 3), mesh, [Shard(0)]))
        plain = nn.Parameter(torch.zeros(2))
        sharded.grad, plain.grad = distribute_tensor(torch.ones(2, 3), mesh, [Shard(0)]), torch.ones(2)
        CompositeMomentum([sharded, plain], 1.0, beta, foreach=foreach, normalize=True).step()
        torch.testing.assert_close(whole(sharded), torch.full((2, 3), -(8**-0.5)))
        torch.testing.assert_close(plain.detach(), torch.full((2,), -(8**-0.5)))


def check_zeros_state(zero: ZeroRedundancyOptimizer, model: nn.Module) -> None:
    """The state that ZeRO brings together on a process is one that an optimizer by itself goes on with."""
    zero.consolidate_state_dict(to=0)
    if distributed.get_rank() == 0:
        alone = CompositeMomentum(model.parameters(), lr=5.0)
        alone.load_state_dict(zero.state_dict())
        train(model, alone, range(4, 6))
        whole_run = network()
        train(whole_run, CompositeMomentum(whole_run.parameters(), lr=0.1), range(6))
        assert_alike(model, whole_run, "ZeRO's state")


def check_wrappers() -> None:
    """Norms that no process knows are refused; without them, ZeRO's steps are the plain ones."""
    with pytest.raises(ValueError, match="under ZeroRedundancyOptimizer a process has only its own share"):
        ZeroRedundancyOptimizer(network().parameters(), CompositeMomentum, lr=0.1, normalize=True)
    plain, model = network(), network()
    train(plain, CompositeMomentum(plain.parameters(), lr=0.1), range(4))
    zero = ZeroRedundancyOptimizer(model.parameters(), CompositeMomentum, lr=0.1)
    train(model, zero, range(4))
    assert_alike(model, plain, "ZeroRedundancyOptimizer")
    check_zeros_state(zero, model)
    said = "under {} a process has only its own share"
    zero.param_groups[0]["normalize"] = True  # as a loaded state may
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=said.format("ZeroRedundancyOptimizer")):
        train(model, zero, range(1))
    assert all(map(torch.equal, before, model.parameters()))
    for original in (True, False):
        flat = FullyShardedDataParallel(network(), use_orig_params=original, device_id=torch.device("cpu"))
        with pytest.raises(ValueError, match=said.format("FullyShardedDataParallel")):
            CompositeMomentum(flat.parameters(), lr=0.1, normalize=True)
        optimizer = CompositeMomentum(flat.parameters(), lr=0.1)
        optimizer.param_groups[0]["normalize"] = True
        with pytest.raises(ValueError, match=said.format("FullyShardedDataParallel")):
            train(flat, optimizer, range(1))


def check_accumulator(mesh) -> None:
    with pytest.raises(TypeError, match="needs each worker's whole gradient; got DTensors"):
        BiasedAccumulator(sharded_by_fsdp(mesh).parameters(), bias="topk:5%", workers=2)


def on_two_processes(folder: Path) -> None:
    distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    check_steps(mesh)
    check_checkpoints(mesh)
    check_states_of_step_0(mesh)
    check_partial_sums(mesh)
    store(mesh, folder)
    check_mixed(mesh)
    check_wrappers()
    check_accumulator(mesh)
    distributed.destroy_process_group()


if __name__ == "__main__":
    if os.environ["WORLD_SIZE"] == "2":
        on_two_processes(Path(sys.argv[1]))
    else:  # what two processes have stored
        for each in range(len(STORED)):
            check_stored(network(), Path(sys.argv[1]), each)
    print("OK")
