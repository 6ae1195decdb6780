"""One step of the server over processes that each carry workers of their own, or share them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.linalg import vector_norm

from metamom.bias import BiasOperator
from metamom.bias.coordinates import Sizes
from metamom.distributed import World
from metamom.server.collect import AllRows, Collected, HeldBack, Messages, PlainMean, StreamedSum, reducible
from metamom.server.part import Part
from metamom.server.partial import PartialStep, partial_collected
from metamom.server.pending import PendingStep
from metamom.server.robust import RobustMean

Report = dict[str, float | int | None]  # grad_norm, bias_error and wire_bytes


class OwnWorkers:
    """Each process adds the gradients of its own workers. Arguments as of an `Aggregation`, but an ``operator``."""

    def __init__(
        self,
        n: int,
        operator: BiasOperator | None,
        how: RobustMean,
        sizes: Sizes | None,
        world: World,
        measure: bool,
        part: Part | None = None,
    ) -> None:
        mine = world.workers(n)
        present = list(mine) if part is None else [worker for worker in mine if worker in part.present]
        streams = not how.gathers and (operator is None or (operator.separable and not operator.feeds_back))
        honest = n - how.faulty if part is None else len(part.present)
        self._n, self._how, self._part = n, how, part
        self._held = None if streams else HeldBack(len(present))
        self._plain = None if operator is None or not measure else PlainMean(honest, world)
        self._step: PendingStep | None = None
        self._collected: Collected
        if part is not None:
            step = None if operator is None else PartialStep(operator, sizes, part, mine)
            self._step, self._collected = step, partial_collected(part, how, step, world)
        else:
            self._step = None if operator is None else PendingStep(operator, sizes)
            self._collected = _collected(n, how, self._step, world)

    def add(self, rows: Tensor, workers: Sequence[int]) -> None:
        """See `Aggregation.add`."""
        if self._how.faulty and max(workers, default=0) >= self._n:
            raise ValueError(f"an attack acts on the last of workers 0 to {self._n - 1}; got worker {max(workers)}.")
        if self._held is not None:
            whole = self._held.add(rows, workers)
            if whole is None:
                return
            rows, workers = whole
        self._collected.add(rows, workers)
        if self._plain is not None:
            self._plain.add(self._counted(rows, workers))

    def _counted(self, rows: Tensor, workers: Sequence[int]) -> Tensor:
        """The rows whose mean the ``bias_error`` is relative to: those of honest workers, by weight."""
        if self._part is not None:
            return self._part.weighted(rows, workers)
        if not self._how.faulty:
            return rows
        return rows[[worker < self._n - self._how.faulty for worker in workers]]

    def transport(self, changes: Tensor, workers: Sequence[int]) -> None:
        """See `Aggregation.transport`."""
        if self._step is None:
            raise ValueError("without an operator, no worker carries a momentum that could change.")
        self._step.transport(changes, workers)

    def finish(self) -> tuple[Tensor, Report]:
        """See `Aggregation.finish`."""
        total = self._collected.combined()
        error: float | None = 0.0
        if self._step is not None:
            error = None if self._plain is None else self._plain.error_of(total)
        report: Report = {
            "grad_norm": float(vector_norm(total)),
            "bias_error": error,
            "wire_bytes": self._collected.wire_bytes(total),
        }
        if self._step is not None:
            self._step.commit()
        self._how.commit(total)
        return total, report


class SharedWorkers:
    """Several processes carry one worker, and each adds the mean over its own tasks. Arguments as of `OwnWorkers`.

    The workers' gradients are combined first, and every process acts as the server of all workers.
    """

    def __init__(
        self,
        n: int,
        operator: BiasOperator | None,
        how: RobustMean,
        sizes: Sizes | None,
        world: World,
        part: Part | None = None,
    ) -> None:
        self._n, self._world = n, world
        self._present = list(range(n)) if part is None else list(part.present)
        self._server = OwnWorkers(n, operator, how, sizes, World(), measure=True, part=part)
        self._total: Tensor | None = None  # [n, d]

    def add(self, rows: Tensor, workers: Sequence[int]) -> None:
        """See `Aggregation.add`."""
        whole = rows.new_zeros(self._n, rows.shape[1])
        whole[list(workers)] = rows * (self._n / self._world.size)
        self._total = whole if self._total is None else self._total + whole

    def transport(self, changes: Tensor, workers: Sequence[int]) -> None:
        """Not supported."""
        raise ValueError(f"a worker that {self._world.size / self._n:g} processes share has no momentum to change.")

    def finish(self) -> tuple[Tensor, Report]:
        """See `Aggregation.finish`."""
        assert self._total is not None
        total = self._world.all_reduce(reducible(self._total, self._world))
        self._server.add(total if len(self._present) == self._n else total[self._present], self._present)
        return self._server.finish()


def _collected(n: int, how: RobustMean, step: PendingStep | None, world: World) -> Collected:
    """The way to collect that fits the aggregate, the operator and the number of processes."""
    if step is not None and step.operator.compresses and world.size > 1:
        return Messages(n, how, step, world)
    if not how.gathers:
        return StreamedSum(n, step, world)
    assert step is not None  # an `Aggregation` takes the identity for a robust mean
    return AllRows(n, how, step, world)
