"""Runs that must not depend on how many processes do them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from metamom import MAML, BiasedAccumulator, CompositeMomentum, evaluate, nets, train
from metamom.bias import RandK, parse
from metamom.common.choices import Variant
from metamom.distributed import Server, World, start
from metamom.tasks import FixedTasks, Sinusoid

META_BATCH = 16
EVALUATED = (60, 53)  # tasks; a prime is drawn whole


class Case(NamedTuple):
    """One run; 16 tasks a step."""

    bias: str = "none"
    workers: int = 8
    aggregate: str = "mean"
    attack: str | None = None
    server: Server = "replicated"
    beta: float = 0.1
    dtype: torch.dtype = torch.float64
    estimator: Any = "exact"
    chunk_size: int | None = None
    steps: int = 4
    dropout: float = 0.0
    more: Mapping[str, Any] = MappingProxyType({})  # further options of `train`
    variant: Variant | None = None


DTYPES = (torch.float64, torch.float32)
COMPRESSED = (
    "topk:5%",
    "topk:5%:all",
    "topk:20%:tensor",
    "randk:5%",
    "randk:50%:scaled",
    "qsgd:4",
    "sign",
    "sign:tensor",
    "mlmc:topk:5%",
    "mlmc:qsgd",
    "block8:block=64:random",
    "powersgd:1",
)
FED_BACK = (
    "ef14:topk:5%",
    "ef21:topk:5%",
    "ef21:qsgd:64:tensor",
    "clip21:0.1",
    "diana(0.3):randk:50%:scaled",
    "ef14:powersgd:2",
)
CASES = {
    **{f"{spec} {dtype}": Case(spec, dtype=dtype) for spec in ("none", "topk:5%") for dtype in DTYPES},
    **{spec: Case(spec) for spec in ("clip:1", "normalize", "clip:0.5+topk:5%", *COMPRESSED, *FED_BACK)},
    **{
        f"{spec} rank0": Case(spec, server="rank0")
        for spec in ("none", "clip:1", "topk:5%", "topk:5%:all", "ef21:topk:5%")
    },
    "ef21-sgdm": Case("ef21-sgdm(0.2):topk:5%", beta=1.0),
    **{
        spec: Case(spec, beta=1.0)
        for spec in (
            "ef21-sgd2m(0.2):topk:5%",
            "clip21-sgd2m:0.1:server=0.5:noise=0.001",
            "dasha(0.2,0.5):mlmc:topk:20%",
        )
    },
    "marina": Case("marina(0.3):randk:50%:scaled"),  # whole at steps 0 and 2
    "marina rank0": Case("marina(0.3):topk:5%", server="rank0"),
    "marina median": Case("marina(0.3):topk:5%", aggregate="median"),
    **{f"{how} {spec}": Case(spec, aggregate=how) for how in ("median", "trimmed:0.3") for spec in ("none", "topk:5%")},
    "median ef21 rank0": Case("ef21:topk:5%", aggregate="median", server="rank0"),
    "geomedian": Case("clip:1", aggregate="geomedian"),
    "byz-ef21-sgdm": Case("ef21-sgdm(0.2):topk:5%", beta=1.0, aggregate="centred-clip:0.5", attack="ipm:2"),
    "buckets": Case(aggregate="bucketing:2>median", attack="gaussian:2:std=0.1"),
    "one worker": Case(workers=1),
    "one worker, ef21": Case("ef21:topk:5%", workers=1),
    "two workers, rank0": Case("topk:5%", workers=2, server="rank0"),
    "chunks of workers": Case("topk:5%", chunk_size=4),
    "chunks within workers": Case("qsgd:4", workers=4, chunk_size=1),
    "moml": Case("topk:20%", estimator="moml", steps=6),  # so that tasks come again, on other processes
    "workers of two processes": Case("randk:5%", workers=2),
    "storm": Case("topk:20%", variant="storm"),
    "storm dropout": Case("randk:20%", variant="storm", dropout=0.2, server="rank0"),
    "hessian": Case(variant="hessian", chunk_size=3),
    **{
        f"{variant} of the workers": Case("ef21-sgdm(0.2):topk:5%", beta=1.0, variant=variant)
        for variant in ("storm", "hessian")
    },
    "dropout": Case("topk:20%", chunk_size=3, dropout=0.2),
    "a quarter present": Case("topk:5%", more={"participation": 0.25}),
    "a quarter present, dropout": Case(dropout=0.2, chunk_size=1, more={"participation": 0.25, "local_steps": 2}),
    "absent shared worker": Case("ef21:topk:5%", workers=2, more={"participation": 0.5}),
    "federated": Case(
        "ef21:topk:5%",
        server="rank0",
        more={
            "participation": 0.3,
            "worker_weights": range(1, 9),
            "local_steps": 2,
            "local_lr": 0.01,
            "down_bias": "randk:20%",
        },
    ),
}
# the paths that a number of processes can change; of these every process more costs time
ON_FOUR = [
    "none torch.float64", "topk:5% torch.float32", "clip:0.5+topk:5%", "topk:5%:all", "qsgd:4",
    "none rank0", "ef21:topk:5% rank0", "median none", "one worker, ef21", "two workers, rank0",
    "chunks within workers", "moml", "workers of two processes", "dropout", "marina", "buckets",
    "absent shared worker", "federated", "storm of the workers",
]  # fmt: skip
# the same paths with other operators, rules and variants: in the slow tests
MORE_ON_FOUR = [
    "sign", "ef21:topk:5%", "median ef21 rank0", "mlmc:topk:5%", "byz-ef21-sgdm", "a quarter present, dropout",
    "storm", "hessian",
]  # fmt: skip
# begun on one process, and gone on with on two, some on four, and again on one: the steps that each number ends with
HANDED_OVER = {1: 1, 2: 2, 4: 3}
RESUMED = (
    "qsgd:4",
    "ef14:topk:5%",
    "ef14:powersgd:2",
    "ef21:topk:5%",
    "median ef21 rank0",
    "moml",
    "one worker, ef21",
    "dropout",
    "marina",
    "byz-ef21-sgdm",
    "buckets",
    "federated",
)
# where workers' states of each kind go to another process, and where one worker is on several
RESUMED_ON_FOUR = ("ef14:powersgd:2", "median ef21 rank0", "moml", "one worker, ef21", "dropout", "federated")


def run(case: Case, world: World | None = None, **options: Any) -> tuple[MAML, list[dict[str, Any]]]:
    """Train; the learner and the metrics."""
    torch.manual_seed(0)
    model: torch.nn.Module = nets.SinusoidMLP(hidden=(12, 12)).to(case.dtype)
    if case.dropout:
        model = torch.nn.Sequential(model, torch.nn.Dropout(case.dropout))
    learner = MAML(
        model,
        F.mse_loss,
        inner_lr=0.02,
        estimator=case.estimator,
        chunk_size=case.chunk_size,
    )
    optimizer = CompositeMomentum(learner.parameters(), lr=0.02, beta=case.beta, variant=case.variant)
    # fewer tasks a step than there are, so that tasks wander from one process to another
    sampler = FixedTasks(Sinusoid(shots=10, queries=10, seed=3), 3 * META_BATCH)
    bias = None if case.bias == "none" else parse(case.bias)
    result = train(
        learner,
        optimizer,
        sampler,
        **{"iterations": case.steps, **options},
        meta_batch=META_BATCH,
        workers=case.workers,
        bias=bias,
        aggregate=case.aggregate,
        attack=case.attack,
        world=world,
        **case.more,
    )
    return learner, result.metrics


def accumulated(workers: int, world: World | None = None) -> list[torch.Tensor]:
    """Somebody's own loop with a `BiasedAccumulator`: each worker fits a line of its own; one weight rests."""
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 3, dtype=torch.float64)
    idle = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    params = [*model.parameters(), idle]
    accumulator = BiasedAccumulator(params, parse("ef21:topk:30%"), workers, world=world)
    optimizer = CompositeMomentum(params, lr=0.1)
    for step in range(5):
        optimizer.zero_grad()
        for worker in range(workers) if world is None else world.workers(workers):
            x = torch.randn(4, 5, generator=torch.Generator().manual_seed(10 * step + worker), dtype=torch.float64)
            model(x).square().mean().backward()
            accumulator.add()
        accumulator.finish()
        assert idle.grad is None
        optimizer.step()
    return [p.detach() for p in params]


def all_cases(folder: Path, names: Sequence[str], resumed: Sequence[str]) -> None:
    """All of it with these processes; results as ``SIZE.pt``, and runs that are gone on with in ``handed over``."""
    with start(timeout=60) as world:
        found: dict[str, Any] = {}
        for name in names:
            case = CASES[name]
            world.server = case.server
            learner, metrics = run(case, world)
            found[name] = ([p.detach() for p in learner.parameters()], metrics)
        values = [evaluate(learner, Sinusoid(), tasks=tasks, steps=(0, 3), world=world) for tasks in EVALUATED]
        found["evaluated"] = ([p.detach() for p in learner.parameters()], [each.values for each in values])
        world.server = "replicated"
        found["accumulated"] = accumulated(8, world)
        for name in resumed:
            world.server = CASES[name].server
            run_dir = folder / "handed over" / name
            run(CASES[name], world, iterations=HANDED_OVER[world.size], run_dir=run_dir, resume=True)
        for _, metrics in (found[name] for name in names):
            for line in metrics:
                del line["seconds"]
        everyones = world.gather_objects(str(found))
        assert all(text == everyones[0] for text in everyones), "processes differ"
        if world.first:
            torch.save(found, folder / f"{world.size}.pt")


def differ() -> None:
    """Steps that processes must refuse: other weights, other arguments, draws in the order of calls, odd numbers."""
    world = start(timeout=30)
    batch = world.sample(Sinusoid(), 0, 4)
    refused: list[tuple[int, dict[str, Any]]] = [
        (world.rank, {}),
        (0, {"workers": 2 + 2 * world.rank}),
        (0, {"workers": 2, "bias": RandK(5, generator=torch.Generator())}),
        (0, {"workers": 3}),
    ]
    for seed, options in refused:
        torch.manual_seed(seed)
        try:
            MAML(nets.SinusoidMLP(), F.mse_loss).backward(batch, world=world, **options)
        except ValueError as error:
            print(error)
    try:
        run(CASES["sign"], world, iterations=2 + world.rank)
    except ValueError as error:
        print(error)
    print(f"{retried(world).tolist()}")
    world.close()


def retried(world: World) -> torch.Tensor:
    """A step that fails on the last process, and is repeated: error feedback moves on once."""
    w = torch.nn.Parameter(torch.zeros(4))
    accumulator = BiasedAccumulator([w], parse("ef21:topk:1"), workers=2, world=world)
    last = world.rank == world.size - 1
    for late in (False, True):
        if late == last:
            (worker,) = world.workers(2)
            (w @ torch.tensor([1.0, 2.0, 3.0, 4.0 + 4 * worker])).backward()
            accumulator.add(worker)
        try:
            accumulator.finish()
        except ValueError as error:
            if late or "nothing to aggregate" not in str(error):
                raise
    assert w.grad is not None
    return w.grad
