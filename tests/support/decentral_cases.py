"""Decentralised runs that must not depend on how many processes carry the workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from metamom import MAML
from metamom.decentral import DecentralizedMomentum, complete, ring, torus
from metamom.distributed import World, start
from metamom.nets.models import SinusoidMLP
from metamom.tasks import Sinusoid

STEPS = 5


class Case(NamedTuple):
    """Eight workers, or as many as the matrix has, and two tasks a step for each."""

    mixing: Tensor
    bias: str | None = None
    beta: float = 0.3
    tracking: bool = True
    dtype: torch.dtype = torch.float64


CASES = {
    "ring": Case(ring(8)),
    "ring, float32": Case(ring(8), "topk:20%", dtype=torch.float32),
    "ring, untracked": Case(ring(8), tracking=False),
    "torus": Case(torus(2, 4), "clip:0.5"),
    "complete": Case(complete(4), "randk:20%"),
    "directed": Case((torch.eye(8) + torch.eye(8).roll(1, 1)) / 2, "ef21:topk:10%"),
    "sgd": Case(ring(4), "ef21-sgdm(0.3):topk:20%", beta=1.0),
}


def made(case: Case, world: World) -> tuple[list[MAML], DecentralizedMomentum]:
    """This process's learners and their optimizer. The workers start apart."""
    n = len(case.mixing)
    nets = [SinusoidMLP((6,), generator=torch.Generator().manual_seed(i)).to(case.dtype) for i in world.workers(n)]
    learners = [MAML(net, F.mse_loss, inner_lr=0.05) for net in nets]
    optimizer = DecentralizedMomentum(
        [learner.parameters() for learner in learners],
        case.mixing,
        lr=0.05,
        beta=case.beta,
        bias=case.bias,
        tracking=case.tracking,
        world=world,
    )
    return learners, optimizer


def moved(case: Case, world: World, learners: list[MAML], optimizer: DecentralizedMomentum, steps: range) -> None:
    """Further steps of a run."""
    tasks, n = Sinusoid(shots=4, queries=4, seed=3, dtype=case.dtype), len(case.mixing)
    for step in steps:
        optimizer.zero_grad()
        parts = tasks.sample(step, 2 * n).split(n)
        for worker, learner in zip(world.workers(n), learners, strict=True):
            learner.backward(parts[worker])
        optimizer.step()


def run(case: Case, world: World) -> dict[str, Any]:
    """Weights of this process's workers ``[own, d]``, and what the optimizer says at the end."""
    learners, optimizer = made(case, world)
    before = world.sent
    moved(case, world, learners, optimizer, range(STEPS))
    sent = world.sent - before
    weights = [torch.cat([p.detach().flatten() for p in learner.parameters()]) for learner in learners]
    return {
        "weights": torch.stack(weights),
        "sent": sent,
        "wire_bytes": optimizer.wire_bytes,
        "edge_bytes": optimizer.edge_bytes,
        "mean": torch.cat([w.flatten() for w in optimizer.mean_weights()]),
        "disagreement": optimizer.disagreement(),
    }


def all_cases(folder: Path) -> None:
    """Every case on these processes; each writes its own part."""
    with start(timeout=60) as world:
        found = {name: run(case, world) for name, case in CASES.items()}
        torch.save(found, folder / f"{world.size}-{world.rank}.pt")


def one_fails(folder: Path) -> None:
    """Four processes on a ring, of which number 2 stops before the second step."""
    world = start(timeout=5)
    learners, optimizer = made(CASES["ring"], world)
    moved(CASES["ring"], world, learners, optimizer, range(1))
    before = torch.stack([next(learner.parameters()).detach().clone() for learner in learners])
    if world.rank == 2:
        return
    try:
        moved(CASES["ring"], world, learners, optimizer, range(1, 2))
    except Exception as error:  # noqa: BLE001  (any at all: the test reads what it was)
        after = torch.stack([next(learner.parameters()).detach() for learner in learners])
        print(f"{type(error).__name__}: {error}; unmoved: {torch.equal(before, after)}")
    else:
        print("stepped")


def they_differ(folder: Path) -> None:
    """Two processes with different graphs, and a worker that two processes would share."""
    with start(timeout=30) as world:
        for case in (Case(ring(4)), Case(ring(4) if world.first else complete(4)), Case(ring(1))):
            try:
                made(case, world)
            except ValueError as error:
                print(error)
