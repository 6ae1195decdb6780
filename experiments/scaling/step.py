"""Time whole steps and collectives on the processes that torchrun has started.

    torchrun --nproc-per-node 2 -m metamom.experiments.scaling.step PLAN.json FOUND.json

PLAN.json holds a `problems.ScalingPlan`'s settings, and ``processes``: all measured numbers of processes. A
step is `MAML.backward` and an optimizer step. Operators and servers take turns, so that a machine that slows down
slows all of them; process 0 writes the measurements. Tasks are drawn beforehand: that is not part of a step.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from metamom.batch import TaskBatch
from metamom.bias import BiasOperator
from metamom.common.allocator import keep_freed_memory
from metamom.distributed import SERVERS, World, start
from metamom.experiments.scaling import collectives
from metamom.experiments.scaling.clock import Clock, TimedOperator, TimedWorld
from metamom.experiments.scaling.loopback import QUIET, loopback_bytes
from metamom.experiments.scaling.problems import Made, Problem, Scaling, make, operator
from metamom.optim import CompositeMomentum

LEAST_ROUNDS = 3
COUNTED = 20  # at most that many steps between readings of the kernel's counter


class Cell:
    """One variant of a step on the running processes, and the seconds of the steps done."""

    def __init__(
        self, made: Made, batch: TaskBatch, world: TimedWorld, scaling: Scaling, spec: str, workers: int
    ) -> None:
        self.made, self.batch, self.world = made, batch, world
        self.scaling, self.spec, self.workers = scaling, spec, workers
        plain = operator(spec)
        self.bias: BiasOperator | None = None if plain is None else TimedOperator(plain, world.clock)
        self.optimizer = CompositeMomentum(made.learner.parameters(), lr=1e-4)
        self.steps: list[float] = []
        self.parts: list[dict[str, float]] = []
        self.metrics: dict[str, Any] = {}

    def step(self, *, keep: bool = True) -> None:
        """Do one step, once all processes have arrived."""
        self.optimizer.zero_grad()
        self.world.agree()
        self.world.clock.read()
        begin = time.perf_counter()
        _, self.metrics = self.made.learner.backward(
            self.batch, workers=self.workers, bias=self.bias, world=self.world, measure=False
        )
        self.optimizer.step()
        seconds = time.perf_counter() - begin
        if keep:
            parts = self.world.clock.read()
            self.steps.append(seconds)
            self.parts.append({**parts, "compute": seconds - sum(parts.values())})

    def found(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "scaling": self.scaling,
            "operator": self.spec,
            "server": self.world.server,
            "processes": self.world.size,
            "workers": self.workers,
            "tasks": self.batch.num_tasks,  # per process
            "entries": self.made.entries,
            "wire_bytes": self.metrics["wire_bytes"],
            "sent_bytes": self.metrics["sent_bytes"],
            "seconds": self.steps,
            "parts": self.parts,
        }


def measure(problem: Problem, plan: dict[str, Any], world: World) -> list[dict[str, Any]]:
    """Measure all cells of a problem, as JSON values."""
    cells = _cells(problem, plan, world)
    for cell in cells:  # first steps allocate what later ones reuse
        cell.step(keep=False)
    begin = time.perf_counter()
    for cell in cells:
        cell.step(keep=False)
    a_round = time.perf_counter() - begin
    rounds = world.broadcast_object(lambda: max(LEAST_ROUNDS, int(plan["seconds"] / a_round)))
    shown = None if world.first else True  # only process 0 shows the progress bar
    label = f"{problem.name}, processes: {world.size}"
    for number in tqdm(range(rounds), desc=label, unit="round", leave=False, disable=shown):
        first = number % len(cells)
        for cell in cells[first:] + cells[:first]:
            cell.step()
    read = [_by_the_kernel(cell, plan["attempts"], plan["counted"]) for cell in cells]
    return [{"problem": problem.name, **cell.found(), "kernel": by_it} for cell, by_it in zip(cells, read, strict=True)]


def _cells(problem: Problem, plan: dict[str, Any], world: World) -> list[Cell]:
    made, clock, cells = make(problem.hidden), Clock(), []
    servers = SERVERS if world.size > 1 else SERVERS[:1]
    for scaling in ("strong", "weak"):
        workers, tasks = problem.deal(scaling, world.size, tuple(plan["processes"]))
        batch = world.sample(made.tasks, 0, tasks)
        for server in servers:
            timed = TimedWorld(world.rank, world.size, server=server)
            timed.clock = clock
            cells += [Cell(made, batch, timed, scaling, spec, workers) for spec in plan["operators"]]
    return cells


def _by_the_kernel(cell: Cell, attempts: int, seconds: float) -> dict[str, float] | None:
    """Bytes of some steps by the kernel's counter and by ours, and the kernel's over an equally long idle time."""
    world = cell.world
    if world.size == 1 or cell.scaling == "weak" or loopback_bytes() is None:
        return None
    steps = world.broadcast_object(lambda: max(2, min(COUNTED, int(seconds / min(cell.steps)))))
    found = {"kernel": 0.0, "counted": 0.0, "idle": 0.0}
    for _ in range(attempts):
        begin, before, counted = time.perf_counter(), _read(), world.sent
        for _ in range(steps):
            cell.step(keep=False)
        counted = world.sent - counted
        elapsed, after = time.perf_counter() - begin, _read()
        time.sleep(elapsed)
        found = {"kernel": after - before, "counted": counted, "idle": _read() - after}
        quiet = world.broadcast_object(lambda found=found: found["idle"] <= QUIET * found["kernel"])  # type: ignore[misc]
        if quiet:
            break
    return found


def _read() -> int:
    read = loopback_bytes()
    assert read is not None
    return read


def main(words: Sequence[str] | None = None) -> None:
    """Read a plan, measure, and write the results."""
    said, found = map(Path, sys.argv[1:] if words is None else words)
    keep_freed_memory()
    with start() as world:
        plan = json.loads(said.read_text(encoding="utf-8"))
        timings = [] if world.size == 1 else collectives.measure(plan["sizes"], plan["repeats"], world)
        cells = [cell for problem in plan["problems"] for cell in measure(Problem(**problem), plan, world)]
        if world.first:
            found.write_text(json.dumps({"cells": cells, "collectives": timings}), encoding="utf-8")


if __name__ == "__main__":
    main()
