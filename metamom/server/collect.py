"""The ways to collect workers' gradients and combine them into one.

Legend: n workers, m of them present; gradients of length d.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from metamom.distributed import World
from metamom.server.part import Part, remembers
from metamom.server.pending import PendingStep
from metamom.server.robust import RobustMean


class Collected(Protocol):
    """The gradients of this process's workers after the operator, or what is left of them."""

    def add(self, rows: Tensor, workers: Sequence[int]) -> None:
        """Add gradients ``[k, d]`` of these workers."""

    def combined(self) -> Tensor:
        """The aggregate ``[d]`` over all processes, which all call this together."""

    def wire_bytes(self, total: Tensor) -> int:
        """Bytes of the present workers' messages, as sent or as they would be."""


class StreamedSum:
    """Keeps the weighted sum of the operator's outputs, for a mean.

    Args:
        part: the present workers, and the weights.
        step: the operator's step; ``None`` without one.
        world: the processes.
    """

    def __init__(self, part: Part, step: PendingStep | None, world: World) -> None:
        self._part, self._step, self._world = part, step, world
        self._total: Tensor | None = None

    def add(self, rows: Tensor, workers: Sequence[int]) -> None:
        """See `Collected`."""
        out = rows if self._step is None else self._step.apply(rows, workers)
        self._total = add_rows(self._total, self._part.weighted(out, workers))

    def combined(self) -> Tensor:
        """See `Collected`."""
        assert self._total is not None
        total, part, step = self._total, self._part, self._step
        operator = None if step is None else step.operator
        absent = part.absent(self._world.workers(part.n))
        if step is not None and absent and remembers(operator):
            total = add_rows(total, part.weighted(step.estimates(absent, total), absent))
        whole = self._world.reduce(reducible(total, self._world))
        return from_server(self._world, lambda: whole / len(part.averaged(operator)), like=whole)

    def wire_bytes(self, total: Tensor) -> int:
        """See `Collected`."""
        return len(self._part.present) * dense_bytes(self._step, total)


class AllRows:
    """Keeps the operator's outputs, for an aggregate that needs each of them. All rows are added in one call.

    Args:
        part: the present workers.
        how: the aggregate.
        step: the operator's step.
        world: the processes.
    """

    def __init__(self, part: Part, how: RobustMean, step: PendingStep, world: World) -> None:
        self._part, self._how, self._step, self._world = part, how, step, world
        self._rows = torch.empty(0)

    def add(self, rows: Tensor, workers: Sequence[int]) -> None:
        """See `Collected`."""
        out = self._step.apply(rows, workers)
        absent = self._part.absent(self._world.workers(self._part.n))
        if absent:  # processes gather equally many rows
            out = torch.cat([out, self._step.estimates(absent, rows)])
        order = _ascending([*workers, *absent])
        self._rows = out if order == [*range(len(order))] else out[order]

    def combined(self) -> Tensor:
        """See `Collected`."""
        gathered = self._world.gather_to_server(self._rows)
        averaged = self._part.averaged(self._step.operator)

        def made() -> Tensor:
            rows = gathered.flatten(0, 1)
            return self._how.combine(rows if len(averaged) == self._part.n else rows[list(averaged)])

        return from_server(self._world, made, like=self._rows[0])

    def wire_bytes(self, total: Tensor) -> int:
        """See `Collected`."""
        return len(self._part.present) * dense_bytes(self._step, total)


class Messages:
    """Keeps the present workers' messages, which several processes send instead of gradients.

    Args:
        part: the present workers, and the weights.
        how: the aggregate.
        step: the step of an operator that compresses.
        world: the processes.
    """

    def __init__(self, part: Part, how: RobustMean, step: PendingStep, world: World) -> None:
        self._part, self._how, self._step, self._world = part, how, step, world
        self._messages: dict[int, Tensor] = {}
        self._like = torch.empty(0)  # one worker's gradient
        self._sent = 0  # bytes

    def add(self, rows: Tensor, workers: Sequence[int]) -> None:
        """See `Collected`."""
        self._messages |= dict(zip(workers, self._step.send(rows, workers), strict=True))
        self._like = rows.new_empty(rows.shape[1])

    def combined(self) -> Tensor:
        """See `Collected`."""
        none = torch.empty(0, dtype=torch.uint8, device=self._like.device)
        mine = [self._messages.get(worker, none) for worker in self._world.workers(self._part.n)]
        everyones = self._lengths(mine)
        self._sent = int(everyones.sum())
        bytes_ = torch.cat(mine)
        padded = nn.functional.pad(bytes_, (0, int(everyones.sum(1).max()) - len(bytes_)))
        gathered = self._world.gather_to_server(padded)

        def made() -> Tensor:
            messages = [
                message
                for row, lengths in zip(gathered, everyones.tolist(), strict=True)
                for message in row[: sum(lengths)].split(lengths)
            ]
            return self._received([messages[worker] for worker in self._part.present])

        return from_server(self._world, made, self._like)

    def _lengths(self, mine: Sequence[Tensor]) -> Tensor:
        """The lengths of all messages, ``[processes, workers of each]``, and 0 for absent workers."""
        lengths = torch.tensor([len(message) for message in mine])
        alike = self._part.plain and not self._step.operator.varies
        return lengths.expand(self._world.size, -1) if alike else self._world.gather(lengths)

    def _received(self, messages: Sequence[Tensor]) -> Tensor:
        """The aggregate of the present workers' messages, on the server."""
        part, d, dtype = self._part, len(self._like), self._like.dtype
        averaged = part.averaged(self._step.operator)
        each = self._how.gathers or part.weights is not None
        whole = self._step.receive(messages, d, dtype, each=each)
        if self._how.gathers:
            return self._how.combine(whole)
        return (part.weighted(whole, averaged).sum(0) if each else whole) / len(averaged)

    def wire_bytes(self, total: Tensor) -> int:
        """See `Collected`."""
        return self._sent


def way_to_collect(part: Part, how: RobustMean, step: PendingStep | None, world: World) -> Collected:
    """The way to collect that fits the aggregate, the operator and the number of processes."""
    if step is not None and step.operator.compresses and world.size > 1:
        return Messages(part, how, step, world)
    if not how.gathers:
        return StreamedSum(part, step, world)
    assert step is not None  # an `Aggregation` takes the identity for a robust mean
    return AllRows(part, how, step, world)


def add_rows(total: Tensor | None, rows: Tensor) -> Tensor:
    """Add the sum of rows ``[k, d]`` to a total ``[d]``; without a total, a single row is not copied."""
    new = rows[0] if len(rows) == 1 else rows.sum(0)
    return new if total is None else total + new


def _ascending(workers: Sequence[int]) -> list[int]:
    """The order in which these workers' numbers rise: robust means see the workers in this order."""
    return sorted(range(len(workers)), key=lambda row: workers[row])


def reducible(total: Tensor, world: World) -> Tensor:
    """A total that processes can reduce in place. The sum of a single row is a view of that row."""
    return total if world.size == 1 else total.clone()


def dense_bytes(step: PendingStep | None, total: Tensor) -> int:
    """The size of one worker's message in bytes, although processes send sums."""
    d, size = len(total), total.element_size()
    return d * size if step is None else step.wire_bytes(d, size)


def from_server(world: World, make: Callable[[], Tensor], like: Tensor) -> Tensor:
    """Call ``make`` on the server, and return its result (shape and dtype of ``like``) on every process."""
    if world.size == 1 or world.server == "replicated":
        return make()
    with world.together():
        made = make() if world.first else torch.empty_like(like)
    return world.broadcast(made)
