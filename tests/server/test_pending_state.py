"""Who owns an operator's next state: the aggregation, until the step has succeeded on every process."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from metamom.bias import BiasOperator, ClipValue, Identity, NonFiniteError, RandK, parse
from metamom.distributed import Server, World
from metamom.server.aggregate import Aggregation, aggregate

SPECS = ["ef14:topk:2", "ef21:topk:2", "ef21-sgdm(0.3):sign", "clip21:0.5", "randk:2", "clip:1+randk:2", "ef21:qsgd:4"]
each_spec = pytest.mark.parametrize("spec", SPECS)
STEPS = torch.randn(4, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)  # [steps, workers, d]


class Threads(World):
    """A process that is a thread; they exchange values through a list that they share."""

    def __init__(self, rank: int, shared: list[Any], barrier: threading.Barrier, server: Server) -> None:
        super().__init__(rank, len(shared), server=server)
        self._values, self._barrier = shared, barrier

    def gather_objects(self, value: Any) -> list[Any]:
        self._values[self.rank] = value
        self._barrier.wait()
        everyones = list(self._values)
        self._barrier.wait()
        return everyones

    def gather(self, tensor: Tensor) -> Tensor:
        return torch.stack(self.gather_objects(tensor.clone()))

    def gather_to_server(self, tensor: Tensor) -> Tensor:
        return self.gather(tensor)

    def reduce(self, tensor: Tensor) -> Tensor:
        return self.all_reduce(tensor)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return tensor.copy_(self.gather(tensor).sum(0))

    def broadcast(self, tensor: Tensor) -> Tensor:
        return tensor.copy_(self.gather(tensor)[0])


def on_processes(size: int, run: Callable[[World], Any], server: Server = "replicated") -> list[Any]:
    """Call ``run`` on every process; their results."""
    shared, barrier = [None] * size, threading.Barrier(size, timeout=60)
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(lambda rank: run(Threads(rank, shared, barrier, server)), range(size)))


def contents(operator: BiasOperator) -> str:
    return f"{operator.state_dict()} {operator.draw_step}"


def step(operator: BiasOperator, rows: Tensor, world: World | None = None, how: str = "mean") -> Tensor:
    """One step; ``rows`` of all workers."""
    world = world or World()
    mine = world.workers(len(rows))
    server = Aggregation(len(rows), operator, how, world=world)
    with world.together():
        for worker in mine:
            server.add(rows[worker : worker + 1], [worker])
    return server.finish()[0]


@each_spec
def test_the_state_moves_when_the_step_has_finished(spec):
    operator = parse(spec)
    aggregate(STEPS[0], operator)
    before, twin = contents(operator), copy.deepcopy(operator)
    server = Aggregation(4, operator)
    for worker in range(4):
        server.add(STEPS[1, worker : worker + 1], [worker])
        assert contents(operator) == before
    total, _ = server.finish()
    assert torch.equal(total, aggregate(STEPS[1], twin)[0])
    assert contents(operator) == contents(twin) != before


@each_spec
def test_a_row_that_is_not_finite_leaves_the_state(spec):
    operator = parse(spec)
    aggregate(STEPS[0], operator)
    before, twin = contents(operator), copy.deepcopy(operator)
    bad = STEPS[1].clone()
    bad[3, 2] = math.nan
    with pytest.raises(NonFiniteError):
        step(operator, bad)
    assert contents(operator) == before
    assert torch.equal(aggregate(STEPS[1], operator)[0], aggregate(STEPS[1], twin)[0])
    assert contents(operator) == contents(twin)


@each_spec
@pytest.mark.parametrize("server", ["replicated", "rank0"])
@pytest.mark.parametrize("how", ["mean", "median"])
def test_a_failure_on_another_process_leaves_the_state(spec, server, how):
    bad = STEPS[2].clone()
    bad[3, 2] = math.nan  # of process 1
    alone = parse(spec)
    expected = [step(alone, rows, how=how) for rows in STEPS]

    def run(world: World) -> list[Tensor]:
        operator = parse(spec)
        found = [step(operator, rows, world, how) for rows in STEPS[:2]]
        before = contents(operator)
        for _ in range(2):
            with pytest.raises(NonFiniteError):
                step(operator, bad, world, how)
            assert contents(operator) == before
        return found + [step(operator, rows, world, how) for rows in STEPS[2:]]

    for found in on_processes(2, run, server):
        for got, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-14)


def test_a_generator_moves_with_the_step_alone():
    operator, twin = (RandK(2, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    bad = STEPS[0].clone()
    bad[0, 0] = math.inf
    with pytest.raises(NonFiniteError):
        aggregate(bad, operator)
    Aggregation(4, operator).add(STEPS[0], range(4))  # a step that is given up
    for rows in STEPS:
        assert torch.equal(aggregate(rows, operator)[0], aggregate(rows, twin)[0])


@pytest.mark.parametrize("operator", [Identity(), ClipValue(1e300)], ids=repr)
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("server", ["replicated", "rank0"])
def test_operators_that_return_their_input_have_no_error(operator, size, server):
    """One worker on each process: its sum is its gradient, which processes must not reduce in place."""

    def run(world: World) -> tuple[Tensor, float]:
        rows = STEPS[0, : world.size].float().clone()
        given = rows.clone()
        aggregation = Aggregation(world.size, operator, world=world)
        aggregation.add(rows[world.rank : world.rank + 1], [world.rank])
        total, report = aggregation.finish()
        assert torch.equal(rows, given)
        return total, float(report["bias_error"])

    for total, error in on_processes(size, run, server):
        torch.testing.assert_close(total, STEPS[0, :size].float().mean(0))
        assert error == pytest.approx(0, abs=1e-6)
