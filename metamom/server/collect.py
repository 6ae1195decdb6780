"""The ways to collect workers' gradients and combine them into one. Shapes: n workers in all, gradients of length d."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm

from metamom.distributed import World
from metamom.server.pending import PendingStep
from metamom.server.robust import Aggregate, robust_mean


class Collected(Protocol):
    """The gradients of this process's workers after the operator, or what is left of them."""

    def add(self, rows: Tensor, workers: Sequence[int]) -> None:
        """Add gradients ``[k, d]`` of these workers."""

    def combined(self) -> Tensor:
        """The aggregate ``[d]`` over all processes, which all call this together."""

    def wire_bytes(self, total: Tensor) -> int:
        """Bytes of the workers' messages, as sent or as they would be."""


class StreamedSum:
    """Keeps the sum of the operator's outputs, for a mean.

    Args:
        n: number of workers, over all processes.
        step: the operator's step; ``None`` without one.
        world: the processes.
    """

    def __init__(self, n: int, step: PendingStep | None, world: World) -> None:
        self._n, self._step, self._world = n, step, world
        self._total: Tensor | None = None

    def add(self, rows: Tensor, workers: Sequence[int]) -> None:
        """See `Collected`."""
        self._total = add_rows(self._total, rows if self._step is None else self._step.apply(rows, workers))

    def combined(self) -> Tensor:
        """See `Collected`."""
        assert self._total is not None
        whole = self._world.reduce(reducible(self._total, self._world))
        return from_server(self._world, lambda: whole / self._n, like=whole)

    def wire_bytes(self, total: Tensor) -> int:
        """See `Collected`."""
        return self._n * dense_bytes(self._step, total)


class AllRows:
    """Keeps the operator's outputs, for an aggregate that is not a mean. All rows are added in one call.

    Args:
        n: number of workers, over all processes.
        how: the aggregate.
        step: the operator's step.
        world: the processes.
    """

    def __init__(self, n: int, how: Aggregate, step: PendingStep, world: World) -> None:
        self._n, self._how, self._step, self._world = n, how, step, world
        self._rows = torch.empty(0)

    def add(self, rows: Tensor, workers: Sequence[int]) -> None:
        """See `Collected`."""
        self._rows = self._step.apply(rows, workers)

    def combined(self) -> Tensor:
        """See `Collected`."""
        rows = self._world.gather_to_server(self._rows)
        return from_server(self._world, lambda: robust_mean(rows.flatten(0, 1), self._how), like=self._rows[0])

    def wire_bytes(self, total: Tensor) -> int:
        """See `Collected`."""
        return self._n * dense_bytes(self._step, total)


class Messages:
    """Keeps the workers' messages, which several processes send instead of gradients.

    Args:
        n: number of workers, over all processes.
        how: the aggregate.
        step: the step of an operator that compresses.
        world: the processes.
    """

    def __init__(self, n: int, how: Aggregate, step: PendingStep, world: World) -> None:
        self._n, self._how, self._step, self._world = n, how, step, world
        self._messages: list[Tensor] = []
        self._like = torch.empty(0)  # one worker's gradient
        self._sent = 0  # bytes

    def add(self, rows: Tensor, workers: Sequence[int]) -> None:
        """See `Collected`."""
        self._messages += self._step.send(rows, workers)
        self._like = rows[0]

    def combined(self) -> Tensor:
        """See `Collected`."""
        everyones = self._lengths()
        self._sent = int(everyones.sum())
        mine = torch.cat(self._messages)
        padded = nn.functional.pad(mine, (0, int(everyones.sum(1).max()) - len(mine)))
        gathered = self._world.gather_to_server(padded)

        def made() -> Tensor:
            messages = [
                message
                for row, each in zip(gathered, everyones.tolist(), strict=True)
                for message in row[: sum(each)].split(each)
            ]
            mean = self._how == "mean"
            whole = self._step.receive(messages, len(self._like), self._like.dtype, each=not mean)
            return whole / self._n if mean else robust_mean(whole, self._how)

        return from_server(self._world, made, self._like)

    def _lengths(self) -> Tensor:
        """The lengths of all messages, ``[processes, workers of each]``."""
        mine = torch.tensor([len(message) for message in self._messages])
        return self._world.gather(mine) if self._step.operator.varies else mine.expand(self._world.size, -1)

    def wire_bytes(self, total: Tensor) -> int:
        """See `Collected`."""
        return self._sent


class HeldBack:
    """Holds gradients back until those of all workers of this process have arrived.

    Args:
        count: the number of these workers.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._rows: list[Tensor] = []
        self._workers: list[int] = []

    def add(self, rows: Tensor, workers: Sequence[int]) -> tuple[Tensor, Sequence[int]] | None:
        """Hold these gradients; return all of them with their workers once none is missing."""
        self._rows.append(rows)
        self._workers += workers
        if len(self._workers) < self._count:
            return None
        held, everyone = self._rows, self._workers
        self._rows, self._workers = [], []
        return torch.cat(held) if len(held) > 1 else rows, everyone


class PlainMean:
    """The mean of the gradients without the operator, to measure its error.

    Args:
        n: number of workers, over all processes.
        world: the processes.
    """

    def __init__(self, n: int, world: World) -> None:
        self._n, self._world = n, world
        self._total: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        """Add gradients ``[k, d]``."""
        self._total = add_rows(self._total, rows)

    def error_of(self, total: Tensor) -> float:
        """The distance of an aggregate ``[d]`` from this mean, relative to the mean's norm."""
        assert self._total is not None
        mean = self._world.all_reduce(reducible(self._total, self._world)) / self._n
        norm = float(vector_norm(mean))
        return float(vector_norm(total - mean)) / norm if norm else 0.0


def add_rows(total: Tensor | None, rows: Tensor) -> Tensor:
    """Add the sum of rows ``[k, d]`` to a total ``[d]``; without a total, a single row is not copied."""
    new = rows[0] if len(rows) == 1 else rows.sum(0)
    return new if total is None else total + new


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
