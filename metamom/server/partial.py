"""A step of the server with absent workers or unequal weights: the operator's step, and the ways to collect.

Legend: n workers, m of them present; gradients of length d; worker i counts with weight ``w_i``, which sum to 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from metamom.bias import BiasOperator
from metamom.bias.coordinates import Sizes
from metamom.distributed import World
from metamom.server.collect import add_rows, dense_bytes, from_server, reducible
from metamom.server.part import Part, remembers
from metamom.server.pending import PendingStep
from metamom.server.robust import RobustMean


class PartialStep(PendingStep):
    """A `PendingStep` in which workers may be absent: what is kept of them does not change.

    Args:
        operator: as of `PendingStep`.
        sizes: as of `PendingStep`.
        part: the present workers.
        mine: the workers of this process.
    """

    def __init__(self, operator: BiasOperator, sizes: Sizes | None, part: Part, mine: Sequence[int]) -> None:
        super().__init__(operator, sizes)
        self._part, self._mine = part, mine
        self._zero = torch.empty(0)  # [d]

    def apply(self, rows: Tensor, workers: Sequence[int]) -> Tensor:
        """See `PendingStep.apply`; without workers, there is nothing to apply."""
        self._zero = rows.new_zeros(rows.shape[1])
        return super().apply(rows, workers) if len(rows) else rows

    def send(self, rows: Tensor, workers: Sequence[int]) -> list[Tensor]:
        """See `PendingStep.send`."""
        self._zero = rows.new_zeros(rows.shape[1])
        return super().send(rows, workers) if len(rows) else []

    def estimate(self, worker: int) -> Tensor:
        """The server's estimate ``[d]`` of a worker of this process; zero before its first gradient."""
        assert self.operator.remembered is not None
        kept = self._state.workers.get(worker)
        return self._zero if not kept else kept[self.operator.remembered].to(self._zero)

    def receive(self, messages: Sequence[Tensor], d: int, dtype: torch.dtype, *, each: bool) -> Tensor:
        """See `PendingStep.receive`, with the messages of the present workers, and estimates of all if it has them."""
        present = list(self._part.present)
        if not each or not remembers(self.operator) or len(present) == self._part.n:
            return super().receive(messages, d, dtype, each=each)
        state = self._state
        zeros = torch.zeros(self._part.n, d, dtype=dtype, device=messages[0].device)
        before = zeros if state.server is None else state.server.to(zeros)
        _, after = self.operator.transition_receive(
            messages, replace(state, server=before[present]), d, dtype, self.sizes, each=True
        )
        assert after.server is not None
        estimates = before.clone()
        estimates[present] = after.server
        self._state = replace(after, server=estimates)
        return estimates

    def commit(self) -> None:
        """See `PendingStep.commit`. Workers that were never present keep zeros, as before their first gradient."""
        names, state = self.operator.kept_names, self._state
        if names:
            new = [worker for worker in self._mine if worker not in state.workers]
            kept = {worker: dict.fromkeys(names, self._zero) for worker in new}
            workers = dict(sorted({**state.workers, **kept}.items()))
            self._state = replace(state, workers=workers)
        super().commit()


class PartialSum:
    """Keeps the weighted sum of the operator's outputs, for a mean. Arguments as of `PartialMessages`."""

    def __init__(self, part: Part, how: RobustMean, step: PartialStep | None, world: World) -> None:
        self._part, self._step, self._world = part, step, world
        self._mine = world.workers(part.n)
        self._total: Tensor | None = None

    def add(self, rows: Tensor, workers: Sequence[int]) -> None:
        """See `metamom.server.collect.Collected`."""
        out = rows if self._step is None else self._step.apply(rows, workers)
        self._total = add_rows(self._total, self._part.weighted(out, workers))

    def combined(self) -> Tensor:
        """See `metamom.server.collect.Collected`."""
        assert self._total is not None
        operator = None if self._step is None else self._step.operator
        total = self._total
        absent = [worker for worker in self._mine if worker not in self._part.present]
        if self._step is not None and remembers(operator) and absent:
            estimates = torch.stack([self._step.estimate(worker) for worker in absent])
            total = add_rows(total, self._part.weighted(estimates, absent))
        whole = self._world.reduce(reducible(total, self._world))
        count = len(self._part.averaged(operator))
        return from_server(self._world, lambda: whole / count, like=whole)

    def wire_bytes(self, total: Tensor) -> int:
        """See `metamom.server.collect.Collected`: of the present workers."""
        return len(self._part.present) * dense_bytes(self._step, total)


class PartialRows:
    """Keeps the operator's outputs, for an aggregate that is not a mean. Arguments as of `PartialMessages`."""

    def __init__(self, part: Part, how: RobustMean, step: PartialStep, world: World) -> None:
        self._part, self._how, self._step, self._world = part, how, step, world
        self._mine = world.workers(part.n)
        self._rows: dict[int, Tensor] = {}
        self._zero = torch.empty(0)

    def add(self, rows: Tensor, workers: Sequence[int]) -> None:
        """See `metamom.server.collect.Collected`."""
        self._zero = rows.new_zeros(rows.shape[1])
        self._rows |= dict(zip(workers, self._step.apply(rows, workers), strict=True))

    def combined(self) -> Tensor:
        """See `metamom.server.collect.Collected`."""
        kept = self._step.estimate if remembers(self._step.operator) else lambda worker: self._zero
        mine = torch.stack([self._rows[worker] if worker in self._rows else kept(worker) for worker in self._mine])
        rows = self._world.gather_to_server(mine)
        averaged = list(self._part.averaged(self._step.operator))
        return from_server(self._world, lambda: self._how.combine(rows.flatten(0, 1)[averaged]), like=self._zero)

    def wire_bytes(self, total: Tensor) -> int:
        """See `metamom.server.collect.Collected`: of the present workers."""
        return len(self._part.present) * dense_bytes(self._step, total)


class PartialMessages:
    """Keeps the present workers' messages, which several processes send instead of gradients.

    Args:
        part: the present workers, and the weights.
        how: the aggregate.
        step: the step of an operator that compresses.
        world: the processes.
    """

    def __init__(self, part: Part, how: RobustMean, step: PartialStep, world: World) -> None:
        self._part, self._how, self._step, self._world = part, how, step, world
        self._mine = world.workers(part.n)
        self._messages: dict[int, Tensor] = {}
        self._like = torch.empty(0)  # one worker's gradient
        self._sent = 0  # bytes

    def add(self, rows: Tensor, workers: Sequence[int]) -> None:
        """See `metamom.server.collect.Collected`."""
        self._like = rows.new_zeros(rows.shape[1])
        self._messages |= dict(zip(workers, self._step.send(rows, workers), strict=True))

    def combined(self) -> Tensor:
        """See `metamom.server.collect.Collected`."""
        part, step, none = self._part, self._step, torch.empty(0, dtype=torch.uint8, device=self._like.device)
        mine = [self._messages.get(worker, none) for worker in self._mine]
        everyones = self._world.gather(torch.tensor([len(message) for message in mine]))  # [processes, workers of each]
        self._sent = int(everyones.sum())
        bytes_ = torch.cat(mine)
        padded = nn.functional.pad(bytes_, (0, int(everyones.sum(1).max()) - len(bytes_)))
        gathered = self._world.gather_to_server(padded)

        def made() -> Tensor:
            messages = [
                message
                for row, each in zip(gathered, everyones.tolist(), strict=True)
                for message in row[: sum(each)].split(each)
            ]
            sent = [messages[worker] for worker in part.present]
            averaged, mean = part.averaged(step.operator), not self._how.gathers
            d, dtype = len(self._like), self._like.dtype
            if mean and part.weights is None:
                return step.receive(sent, d, dtype, each=False) / len(averaged)
            rows = step.receive(sent, d, dtype, each=True)
            if mean:
                return part.weighted(rows, averaged).sum(0) / len(averaged)
            return self._how.combine(rows)

        return from_server(self._world, made, self._like)

    def wire_bytes(self, total: Tensor) -> int:
        """See `metamom.server.collect.Collected`: of the present workers."""
        return self._sent


Partial = PartialSum | PartialRows | PartialMessages


def partial_collected(part: Part, how: RobustMean, step: PartialStep | None, world: World) -> Partial:
    """The way to collect that fits the aggregate, the operator and the number of processes."""
    if step is not None and step.operator.compresses and world.size > 1:
        return PartialMessages(part, how, step, world)
    if not how.gathers:
        return PartialSum(part, how, step, world)
    assert step is not None  # an `Aggregation` takes the identity for a robust mean
    return PartialRows(part, how, step, world)
