"""One step of the server over processes that each carry workers of their own, or share them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.linalg import vector_norm

from metamom.bias import BiasOperator
from metamom.bias.coordinates import Sizes
from metamom.distributed import World
from metamom.server.collect import add_rows, reducible, way_to_collect
from metamom.server.part import Part
from metamom.server.pending import PendingStep
from metamom.server.robust import RobustMean

Report = dict[str, float | int | None]  # grad_norm, bias_error and wire_bytes


class OwnWorkers:
    """Each process adds the gradients of its own workers. Arguments as of an `Aggregation`, checked."""

    def __init__(
        self,
        part: Part,
        operator: BiasOperator | None,
        how: RobustMean,
        sizes: Sizes | None,
        world: World,
        measure: bool,
    ) -> None:
        mine = world.workers(part.n)
        streams = not how.gathers and (operator is None or (operator.separable and not operator.feeds_back))
        honest = len(part.present) - how.faulty
        self._part, self._how = part, how
        self._held = None if streams else HeldBack(len(mine) - len(part.absent(mine)))
        self._plain = None if operator is None or not measure else PlainMean(honest, world)
        self._step = None if operator is None else PendingStep(operator, sizes, part, mine)
        self._collected = way_to_collect(part, how, self._step, world)

    def add(self, rows: Tensor, workers: Sequence[int]) -> None:
        """See `Aggregation.add`."""
        n = self._part.n
        if self._how.faulty and max(workers, default=0) >= n:
            raise ValueError(f"an attack acts on the last of workers 0 to {n - 1}; got worker {max(workers)}.")
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
        if not self._how.faulty:
            return self._part.weighted(rows, workers)
        return rows[[worker < self._part.n - self._how.faulty for worker in workers]]

    def transport(self, changes: Tensor, workers: Sequence[int]) -> None:
        """See `Aggregation.transport`."""
        if self._step is None:
            raise _without_momentum()
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


class LocalMean:
    """The mean over n workers of one process, all present, with equal weights and without an operator.

    The same as `OwnWorkers` finds, with less to ask: most steps are of this kind.
    """

    def __init__(self, n: int) -> None:
        self._n = n
        self._total: Tensor | None = None

    def add(self, rows: Tensor, workers: Sequence[int]) -> None:
        """See `Aggregation.add`."""
        self._total = add_rows(self._total, rows)

    def transport(self, changes: Tensor, workers: Sequence[int]) -> None:
        """Not supported."""
        raise _without_momentum()

    def finish(self) -> tuple[Tensor, Report]:
        """See `Aggregation.finish`."""
        assert self._total is not None
        # the only row is the caller's, and the result may be changed in place
        total = self._total.clone() if self._n == 1 else self._total / self._n
        return total, _report_of_mean(total, self._n)


def mean_of(rows: Tensor) -> tuple[Tensor, Report]:
    """What a `LocalMean` finds of the gradients ``[n, d]`` of all workers: their mean, a new tensor, and its report."""
    n = len(rows)
    total = rows[0].clone() if n == 1 else rows.sum(0) / n
    return total, _report_of_mean(total, n)


def _report_of_mean(total: Tensor, n: int) -> Report:
    return {"grad_norm": float(vector_norm(total)), "bias_error": 0.0, "wire_bytes": n * total.nbytes}


class SharedWorkers:
    """Several processes carry one worker, and each adds the mean over its own tasks. Arguments as of `OwnWorkers`.

    The workers' gradients are combined first, and every process acts as the server of all workers.
    """

    def __init__(
        self, part: Part, operator: BiasOperator | None, how: RobustMean, sizes: Sizes | None, world: World
    ) -> None:
        self._n, self._present, self._world = part.n, list(part.present), world
        self._server = OwnWorkers(part, operator, how, sizes, World(), measure=True)
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
        n: number of workers, over all processes; the honest ones if some attack.
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


def _without_momentum() -> ValueError:
    return ValueError("without an operator, no worker carries a momentum that could change.")
