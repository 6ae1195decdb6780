"""What processes do with models in DDP, and the gradients that each of them has: known numbers, not a network's."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from operators import EVERY
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from metamom import CompositeMomentum, RandK
from metamom.interop.ddp import register
from metamom.server import RobustMean

SHAPES = [(5,), (2, 3), (1,), (4,)]
SIZES = [5, 6, 1, 4]
STEPS = 4
SEVERAL = 1e-5  # MiB in a bucket: after the first step, three of them
BY_BUCKET = [
    "none",
    "topk:30%",
    "clip:1",
    "sign:tensor",
    "qsgd:4",
    "randk:50%",
    "ef14:topk:30%",
    "ef21:topk:30%",
    "ef21:qsgd:64:tensor",
    "ef21-sgdm(0.2):topk:30%",
    "clip21:0.5",
]
SAVED = ["ef21:topk:30%", "ef14:qsgd:4", "randk:50%"]
SCOPES = ["model", "bucket"]
AGGREGATES = ["median", "trimmed:0.4", "geomedian"]
OPERATORS = {repr(operator): operator for operator in EVERY}


def gradient_of(rank: int, step: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Of each parameter."""
    generator = torch.Generator().manual_seed(1000 * rank + step)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


def rows_of(size: int, step: int) -> Tensor:
    """Of all workers, ``[n, d]``."""
    return torch.stack([flat(gradient_of(rank, step)) for rank in range(size)])


def flat(tensors: Sequence[Tensor | None]) -> Tensor:
    return torch.cat([torch.empty(0) if t is None else t.detach().reshape(-1) for t in tensors])


class Linear(nn.Module):
    """A loss whose gradient is what it is given."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in SHAPES])

    def forward(self, gradient: Sequence[Tensor], used: Sequence[int] = range(len(SHAPES))) -> Tensor:
        return torch.stack([(self.weights[i] * gradient[i]).sum() for i in used]).sum()


def made(dtype: torch.dtype = torch.float32, **options: Any) -> DistributedDataParallel:
    return DistributedDataParallel(Linear(dtype), **options)


def step(model: DistributedDataParallel, number: int, **options: Any) -> Tensor:
    """The aggregate that is in ``.grad`` after a step of this process's gradient."""
    model.zero_grad()
    dtype = model.module.weights[0].dtype
    model(gradient_of(dist.get_rank(model.process_group), number, dtype), **options).backward()
    return flat([p.grad for p in model.parameters()]).clone()


def steps(model: DistributedDataParallel, numbers: Sequence[int] = range(STEPS)) -> Tensor:
    return torch.stack([step(model, number) for number in numbers])


def with_every_operator() -> dict[str, Tensor]:
    found = {}
    for name, operator in OPERATORS.items():
        model = made()
        register(model, operator)
        found[name] = steps(model)
    return found


def by_bucket() -> dict[str, Any]:
    """With the buckets of each step: one, and several once DDP has made them again."""
    found: dict[str, Any] = {}
    for spec in BY_BUCKET:
        model = made(bucket_cap_mb=SEVERAL)
        reduction = register(model, spec, "bucket")
        found[spec] = [(step(model, number), reduction._groups) for number in range(STEPS)]
    return found


def robust() -> dict[str, Tensor]:
    found = {}
    for how in AGGREGATES:
        for spec in ("none", "ef21:topk:30%"):
            if how != "trimmed:0.4" or dist.get_world_size() > 2:
                model = made()
                register(model, spec, aggregate=how)
                found[f"{how} {spec}"] = steps(model)
    if dist.get_world_size() > 1:
        model = made()
        register(model, "ef21:topk:30%", aggregate=attacked())
        found["attacked"] = steps(model)
    return found


def attacked() -> RobustMean:
    return RobustMean("centred-clip:0.5", attack="ipm:1")


def as_torch() -> dict[str, tuple[Tensor, Tensor]]:
    """Ours and torch's: DDP without a hook, and compressed to 16 bits."""
    plain, mean, compressed, narrow = made(), made(), made(), made()
    register(mean)
    compressed.register_comm_hook(None, default_hooks.fp16_compress_hook)
    register(narrow, dtype=torch.float16)
    return {"mean": (steps(mean), steps(plain)), "float16": (steps(narrow), steps(compressed))}


def accumulated(spec: str) -> Tensor:
    """Two backward passes a step, the first within ``no_sync``."""
    model, found = made(bucket_cap_mb=SEVERAL), []
    register(model, spec)
    for number in range(0, 2 * STEPS, 2):
        model.zero_grad()
        with model.no_sync():
            model(gradient_of(dist.get_rank(), number)).backward()
        model(gradient_of(dist.get_rank(), number + 1)).backward()
        found.append(flat([p.grad for p in model.parameters()]))
    return torch.stack(found)


def partly_used(spec: str, options: dict[str, Any]) -> Tensor:
    """Parameter 2 is used by process 0 alone, parameter 3 by none."""
    model = made(**options)
    register(model, spec)
    used = (0, 1, 2) if dist.get_rank() == 0 else (0, 1)
    found = torch.stack([step(model, number, used=used) for number in range(STEPS)])
    assert model.module.weights[3].grad is None
    return found


def in_16_bits() -> dict[str, Tensor]:
    found = {}
    for dtype in (torch.bfloat16, torch.float16):
        model = made(dtype, bucket_cap_mb=SEVERAL)
        reduction = register(model, "ef21:topk:30%")
        found[str(dtype)] = steps(model)
        kept = reduction.operator.current_state().workers[dist.get_rank()]["estimate"]
        assert (found[str(dtype)].dtype, kept.dtype) == (dtype, torch.float32)
    return found


def scaled() -> dict[str, Any]:
    """Steps with a `GradScaler`, which halves its scale at step 1: the last process's gradient is infinite."""
    found: dict[str, Any] = {}
    last = dist.get_rank() == dist.get_world_size() - 1
    for scope in SCOPES:
        model = made(bucket_cap_mb=SEVERAL)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**7, growth_interval=2)
        reduction = register(model, "ef21:topk:30%", scope, scaler=scaler)
        weights, scales, groups = [], [], []
        for number in range(STEPS):
            optimizer.zero_grad()
            loss = model(gradient_of(dist.get_rank(), number))
            scaler.scale(loss * (float("inf") if last and number == 1 else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
            weights.append(flat([*model.parameters()]).clone())
            scales.append(scaler.get_scale())
            groups.append(reduction._groups)
        found[scope] = (torch.stack(weights), scales, groups)
    return found


def saved(folder: Path) -> dict[str, Tensor]:
    """What steps 2 and 3 are in runs whose states were saved before."""
    found = {}
    for spec, scope in itertools.product(SAVED, SCOPES):
        model = made(bucket_cap_mb=SEVERAL)
        reduction = register(model, spec, scope)
        steps(model, range(2))
        torch.save(reduction.state_dict(gather=False), folder / own_state(spec, scope))
        state = reduction.state_dict()
        if dist.get_rank() == 0:
            torch.save(state, folder / state_of_all(spec, scope, dist.get_world_size()))
        found[f"{spec} {scope}"] = steps(model, range(2, 4))
    dist.barrier()
    return found


def state_of_all(spec: str, scope: str, size: int) -> str:
    return f"{spec} {scope}, {size} processes.pt"


def own_state(spec: str, scope: str) -> str:
    return f"{spec} {scope}, process {dist.get_rank()} of {dist.get_world_size()}.pt"


def resumed(path: Path, spec: str, scope: str, **options: Any) -> Tensor:
    """Steps 2 and 3 after loading. DDP makes its buckets again after one step, of whatever gradient."""
    model = made(bucket_cap_mb=SEVERAL)
    reduction = register(model, spec, scope)
    step(model, 7)
    reduction.load_state_dict(torch.load(path, weights_only=True), **options)
    return steps(model, range(2, 4))


def all_resumed(folder: Path) -> dict[str, Tensor]:
    found, size = {}, dist.get_world_size()
    for spec, scope in itertools.product(SAVED, SCOPES):
        found[f"{spec} {scope}"] = resumed(folder / state_of_all(spec, scope, size), spec, scope)
        found[f"{spec} {scope}, own"] = resumed(folder / own_state(spec, scope), spec, scope)
        if size != 2:
            path = folder / state_of_all(spec, scope, 2)
            found[f"{spec} {scope}, from 2"] = resumed(path, spec, scope, strict=False)
    other = folder / state_of_all("ef21:topk:30%", "bucket", size)
    found["bucket to model"] = resumed(other, "ef21:topk:30%", "model")
    return found


def reported() -> tuple[dict[str, Any], int]:
    """Of one step, and the bytes that processes have sent each other in it."""
    model = made()
    reduction = register(model, "topk:30%")
    steps(model, range(2))
    before = reduction.world.sent
    step(model, 2)
    return reduction.report, reduction.world.sent - before


def within_a_group() -> Tensor | None:
    """Processes 1 and 2 of three train a model of theirs, as workers 0 and 1."""
    group = dist.new_group([1, 2])
    if dist.get_rank() == 0:
        return None
    model = made(process_group=group)
    reduction = register(model, "ef21:topk:30%")
    found = steps(model)
    assert sorted(reduction.state_dict()["operator"]["workers"]) == [0, 1]
    return found


def of_uneven_lengths() -> Tensor:
    """Process 0 has a step more than the others, whose gradient is zero in it."""
    model = made()
    register(model, "topk:30%")
    with model.join():
        return steps(model, range(STEPS if dist.get_rank() == 0 else STEPS - 1))


def said(action: Callable[[], object]) -> str:
    try:
        action()
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def refused(folder: Path) -> dict[str, str]:
    found = {}
    found["generator"] = said(lambda: register(made(), RandK(2, generator=torch.Generator())))
    found["bare"] = said(lambda: register(Linear()))
    found["k"] = said(lambda: register(made(), "topk:17"))
    found["scope"] = said(lambda: register(made(), "topk:1", "layer"))
    found["aggregate"] = said(lambda: register(made(), aggregate="trimmed:0.1"))
    found["aggregate by bucket"] = said(lambda: register(made(), scope="bucket", aggregate=attacked()))
    found["aggregate with state"] = said(lambda: register(made(), aggregate="centred-clip:0.5"))
    found["dtype"] = said(lambda: register(made(), dtype=torch.int8))
    found["scaler"] = said(lambda: register(made(), scaler=2.0))
    twice = made()
    register(twice)
    found["twice"] = said(lambda: register(twice))
    sparse = DistributedDataParallel(nn.Sequential(nn.Embedding(3, 2, sparse=True)))
    found["sparse"] = said(lambda: register(sparse))
    model = made()
    register(model, "topk:2")
    bad = float("nan") if dist.get_rank() == 1 else 1.0
    found["nan"] = said(lambda: model([bad * g for g in gradient_of(0, 0)]).backward())
    reduction = register(made(), "ef21:topk:30%")
    state = torch.load(folder / state_of_all("ef21:topk:30%", "model", 2), weights_only=True)
    own = state["operator"]["workers"][1 - dist.get_rank()]
    own = {**state, "operator": {**state["operator"], "workers": {1 - dist.get_rank(): own}}}
    found["another's"] = said(lambda: reduction.load_state_dict(own))
    found["count"] = said(lambda: reduction.load_state_dict({**state, "workers": 5}))
    found["names"] = said(lambda: reduction.load_state_dict({**state, "parameters": {"w": [16]}}))
    found["no state"] = said(lambda: reduction.load_state_dict({}))
    return found


def copied() -> list[dict[str, Any]]:
    """The state of error feedback, in a model, its copy and its pickle. PyTorch gives these the group of all."""
    model = made()
    register(model, "ef21:topk:30%")
    step(model, 0)
    pickled = pickle.loads(pickle.dumps(model))
    states = [each._comm_hooks[0][1].state_dict()["operator"] for each in (model, copy.deepcopy(model), pickled)]
    return [{"workers": state["workers"]} for state in states]


def momentum_of_the_workers() -> str:
    """The optimizer must not average again what workers have averaged."""
    model = made()
    register(model, "ef21-sgdm(0.2):topk:30%")
    optimizer = CompositeMomentum(model.parameters(), lr=0.1, beta=0.1)
    step(model, 0)
    return said(optimizer.step)


def all_cases(folder: Path) -> None:
    """Everything, on as many processes as there are; each writes what it has found."""
    dist.init_process_group("gloo")
    size = dist.get_world_size()
    options = {"find_unused_parameters": True, "bucket_cap_mb": SEVERAL}
    found: dict[str, Any] = {
        "every": with_every_operator(),
        "buckets": by_bucket(),
        "robust": robust(),
        "torch": as_torch(),
        "accumulated": accumulated("ef21:topk:30%"),
        "partly used": partly_used("ef21:topk:30%", options),
        "static graph": partly_used("ef21:topk:30%", {**options, "static_graph": True}),
        "views": steps(_with_views()),
        "16 bits": in_16_bits(),
        "scaled": scaled(),
        "saved": saved(folder),
        "reported": reported(),
        "uneven": of_uneven_lengths(),
        "copied": copied(),
        "momentum": momentum_of_the_workers(),
    }
    found["resumed"] = all_resumed(folder)
    if size == 3:
        found["group"] = within_a_group()
    if size == 2:
        found["refused"] = refused(folder)
    torch.save(found, folder / f"found by {dist.get_rank()} of {size}")
    dist.barrier()  # process 0 has the store that others may still need
    dist.destroy_process_group()


def _with_views() -> DistributedDataParallel:
    model = made(gradient_as_bucket_view=True, bucket_cap_mb=SEVERAL)
    register(model, "ef21:topk:30%")
    return model
