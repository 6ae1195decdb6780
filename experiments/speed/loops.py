"""vmap, a loop over the tasks, and a plain autograd loop, on other people's kinds of networks.

    python -m metamom.experiments.speed.loops --networks bottlenecks --tasks 4,16 --sizes 28 --seconds 10

One iteration is one meta-gradient with one inner step. All contenders run in turns in one process; ratios compare CPU
times of the same round. Set ``OMP_NUM_THREADS=1``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metamom.batch import TaskBatch
from metamom.common.checks import MOST
from metamom.common.flag_types import count, counts, number
from metamom.experiments.speed.outside import OUTSIDE, WAYS, Outside
from metamom.maml.learner import MAML
from metamom.maml.running.vectorize import VECTORIZE, Vectorize
from metamom.maml.vmap_errors import VmapError

ORDERS = ("second", "first")
INNER_LR = 0.01
WARM_UP = 2
TURN_SECONDS = 0.02  # at least, for each contender's turn: a training repeats the same work


def plain_loop(model: nn.Module, batch: TaskBatch, first_order: bool) -> Callable[[], None]:
    """The loop that a user writes: functional_call, gradient, step, query loss, gradient; added to ``.grad``."""
    weights: dict[str, Tensor] = dict(model.named_parameters())
    tasks = list(zip(*batch[:4], strict=True))

    def loss(own: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, own, (x,)), y)

    def iterate() -> None:
        model.zero_grad()
        for support_x, support_y, query_x, query_y in tasks:
            inner = loss(weights, support_x, support_y)
            grads = torch.autograd.grad(inner, list(weights.values()), create_graph=not first_order)
            own = {name: w - INNER_LR * g for (name, w), g in zip(weights.items(), grads, strict=True)}
            (loss(own, query_x, query_y) / len(tasks)).backward()  # type: ignore[no-untyped-call]

    return iterate


def ours(model: nn.Module, batch: TaskBatch, first_order: bool, vectorize: Vectorize) -> Callable[[], None]:
    """`metamom.maml.MAML.backward`."""
    estimator = "first-order" if first_order else "exact"
    learner = MAML(model, F.cross_entropy, inner_lr=INNER_LR, estimator=estimator, vectorize=vectorize)

    def iterate() -> None:
        model.zero_grad()
        learner.backward(batch)

    return iterate


def noise(network: Outside, size: int, tasks: int, points: int) -> TaskBatch:
    """Tasks of noise, with as many points to adapt on as to judge by."""
    generator = torch.Generator().manual_seed(0)

    def one() -> tuple[Tensor, Tensor]:
        shape = (tasks, points, *network.shape(size))
        x = torch.randint(50, shape, generator=generator) if network.tokens else torch.randn(shape, generator=generator)
        return x, torch.randint(WAYS, (tasks, points), generator=generator)

    return TaskBatch(*one(), *one())


def measure(contenders: dict[str, Callable[[], None]], seconds: float, rounds: int) -> dict[str, list[float]]:
    """CPU milliseconds of an iteration of each contender, round by round."""
    repeats: dict[str, int] = {}
    for name, iterate in [*contenders.items()]:
        try:
            for _ in range(WARM_UP):
                iterate()
        except VmapError:  # runs in a loop alone
            del contenders[name]
            continue
        start = time.process_time()
        iterate()
        repeats[name] = max(1, round(TURN_SECONDS / max(time.process_time() - start, 1e-6)))
    found: dict[str, list[float]] = {name: [] for name in contenders}
    end = time.monotonic() + seconds
    while len(next(iter(found.values()))) < rounds and (time.monotonic() < end or len(next(iter(found.values()))) < 3):
        for name, iterate in contenders.items():
            start = time.process_time()
            for _ in range(repeats[name]):
                iterate()
            found[name].append(1e3 * (time.process_time() - start) / repeats[name])
    return found


def compare(
    name: str, size: int, tasks: int, points: int, first_order: bool, ways: Sequence[Vectorize], arguments: Any
) -> dict[str, Any]:
    """Measure one network on one kind of tasks: quartiles of the ratios, plain loop over ours."""
    network = OUTSIDE[name]
    batch = noise(network, size, tasks, points)

    def model() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            return network.make(size)

    contenders = {"plain": plain_loop(model(), batch, first_order)}
    contenders |= {way: ours(model(), batch, first_order, way) for way in ways}
    times = measure(contenders, arguments.seconds, arguments.rounds)
    ratios = {
        way: np.percentile(np.divide(times["plain"], times[way]), [25, 50, 75]).tolist() for way in ways if way in times
    }
    kind = {"network": name, "size": size if network.is_image else None, "tasks": tasks, "points": points}
    milliseconds = {each: float(np.median(values)) for each, values in times.items()}
    return {**kind, "first_order": first_order, "rounds": len(times["plain"]), "ms": milliseconds, "speed": ratios}


def line(found: dict[str, Any]) -> str:
    """One line of the table: medians and quartiles of the ratios."""
    size = "" if found["size"] is None else f" {found['size']}x{found['size']}"
    order = "first " if found["first_order"] else "second"
    head = f"{found['network'] + size:<24}{found['tasks']:>3} x {found['points']:<3}{order} {found['ms']['plain']:8.2f}"
    ratios = (f"{way} {mid:.2f} ({low:.2f}-{high:.2f})" for way, (low, mid, high) in found["speed"].items())
    return f"{head}  {'  '.join(ratios)}"


def main(words: Sequence[str] | None = None) -> int:
    """Print a line for each network, size, number of tasks and order."""
    parser = argparse.ArgumentParser(
        prog="python -m metamom.experiments.speed.loops",
        description="Compare vmap with loops over the tasks.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--networks", default=",".join(OUTSIDE), help=f"some of {', '.join(OUTSIDE)} (default: all)")
    add("--tasks", type=counts(count(MOST, 1)), default=(4, 16, 32), help="numbers of tasks (default: 4,16,32)")
    add("--sizes", type=counts(count(MOST, 1)), default=(28,), help="height and width of the images (default: 28)")
    add(
        "--points",
        type=counts(count(MOST, 1)),
        default=(5,),
        help="points of a task, to adapt on and to judge by (default: 5)",
    )
    add("--orders", default=",".join(ORDERS), help="(default: second,first)")
    add("--vectorize", default=",".join(VECTORIZE), help="(default: auto,vmap,loop)")
    add("--seconds", type=number, default=8.0, help="for each line (default: 8)")
    add("--rounds", type=count(MOST, 1), default=200, help="most rounds of each line (default: 200)")
    add("--json", action="store_true", help="print JSON, a line each")
    arguments = parser.parse_args(words)
    names = arguments.networks.split(",")
    ways: Any = arguments.vectorize.split(",")
    orders = arguments.orders.split(",")
    every = (OUTSIDE, names, "--networks"), (ORDERS, orders, "--orders"), (VECTORIZE, ways, "--vectorize")
    for known, given, option in every:
        if unknown := sorted(set(given) - set(known)):
            parser.error(f"{option}: {', '.join(unknown)} not among {', '.join(known)}.")
    if not arguments.json:
        print("network, images          tasks x points  plain, ms  times as fast (quartiles)")
    for name in names:
        for size in arguments.sizes if OUTSIDE[name].is_image else (0,):
            for tasks in arguments.tasks:
                for points in arguments.points:
                    for order in orders:
                        found = compare(name, size, tasks, points, order == "first", ways, arguments)
                        print(json.dumps(found) if arguments.json else line(found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
