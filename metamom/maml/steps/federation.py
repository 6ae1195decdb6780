"""Federated options of a step: absent workers, their weights, local steps, and a compressed message to the workers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from metamom.batch import TaskBatch
from metamom.bias import BiasOperator, Layout
from metamom.common.checks import check_number, check_whole
from metamom.common.trees import mapped
from metamom.distributed import World
from metamom.maml.chunk_results import OfTasks
from metamom.maml.estimators import ESTIMATORS, Estimator
from metamom.maml.task_weights import Params
from metamom.server.aggregate import unflatten
from metamom.server.down import DownBias, Seen, as_down_bias, compared
from metamom.server.part import normalised_weights
from metamom.server.participation import Participation


class Federation(NamedTuple):
    """The options, see `metamom.MAML.backward`. By default all workers take one step each from the server's weights.

    Attributes:
        participation: draws the workers of each step; ``None`` for all.
        worker_weights: of all workers; ``None`` for equal ones.
        local_steps: H.
        local_lr: the step size of local steps.
        down: compresses the server's message; ``None`` for a whole one.
    """

    participation: Participation | None = None
    worker_weights: Sequence[float] | None = None
    local_steps: int = 1
    local_lr: float | None = None
    down: DownBias | None = None

    def check(self, tasks: int, workers: int, world: World) -> None:
        """Refuse options out of range, and a number of tasks of all processes that local steps do not divide.

        Raises:
            TypeError: for a number of the wrong type.
            ValueError: with what to change.
        """
        normalised_weights(self.worker_weights, workers)
        check_local(self.local_steps, self.local_lr)
        if self.down is not None and world.size > 1 and not self.down.operator.separable:
            raise ValueError(
                f"down_bias={self.down.operator.spec} draws from a generator, which several processes do not share: "
                "make it with seed= in place of generator=."
            )
        if self.local_steps == 1:
            return
        if workers < world.size:
            raise ValueError(
                f"local steps need each worker on one process; got {workers} workers on {world.size} processes. Use at "
                "least as many workers as processes."
            )
        check_tasks(tasks, workers, self.local_steps)

    def described(self) -> str:
        """What processes must agree on, for an error; empty for the defaults."""
        words = [] if self.participation is None else [repr(self.participation), f"after {self.participation.steps}"]
        words += [] if self.worker_weights is None else [f"worker_weights={[*self.worker_weights]}"]
        words += [] if self.local_steps == 1 else [f"local_steps={self.local_steps}, local_lr={self.local_lr}"]
        words += [] if self.down is None else [f"down_bias={compared(self.down)}"]
        return "".join(f", {word}" for word in words)

    def present(self, workers: int) -> tuple[int, ...] | None:
        """The workers of this step; ``None`` for all."""
        chosen = None if self.participation is None else self.participation.present(workers)
        return None if chosen is None or len(chosen) == workers else chosen

    @contextmanager
    def seen(self, weights: Params, workers: int) -> Iterator[dict[str, float | int | None]]:
        """Give the parameters the values that workers see inside this block, and report the bytes of the messages.

        What the workers see is stored, and the step counted, unless the block fails.
        """
        if self.down is None:
            yield {}
        else:
            flat = torch.cat([w.detach().reshape(-1) for w in weights.values()])
            found = self.down.next(flat, Layout(w.shape for w in weights.values()))
            with replaced(weights, found):
                yield {"wire_bytes_down": workers * found.bytes}
            self.down.commit(found)
        if self.participation is not None:
            self.participation.advance()


def kept_participation(
    share: Participation | float | None, kept: dict[str, Participation | DownBias]
) -> Participation | None:
    """Convert ``participation=``. One made from a share is ``kept`` by its text, since it counts steps.

    Raises:
        TypeError: for anything but a `Participation` or a number.
        ValueError: for a share out of range.
    """
    if share is None or isinstance(share, Participation):
        return share
    made = Participation(share)
    found = kept.setdefault(f"participation={made.share!r}", made)
    assert isinstance(found, Participation)
    return found


def kept_down_bias(
    down: DownBias | BiasOperator | str | None, kept: dict[str, Participation | DownBias]
) -> DownBias | None:
    """Convert ``down_bias=``. One made from a SPEC is ``kept`` by its text, since it has a state.

    Raises:
        TypeError: for anything but a `DownBias`, its operator or a SPEC.
        ValueError: for a SPEC that does not name an operator.
    """
    made = as_down_bias(down)
    if made is None or made is down:
        return made
    if not isinstance(down, str):
        raise TypeError(
            f"down_bias keeps a state from step to step: make it once, down = DownBias({down!r}), and pass "
            "down_bias=down."
        )
    found = kept.setdefault(f"down_bias={down}", made)
    assert isinstance(found, DownBias)
    return found


def check_local(steps: object, lr: object) -> None:
    """Check the number of local steps, and their step size.

    Raises:
        TypeError: for anything but numbers.
        ValueError: for numbers out of range, or several steps without a step size.
    """
    if check_whole("local_steps", steps, 1) > 1 and lr is None:
        raise ValueError(f"local_steps={steps} needs the step size of local steps: pass local_lr > 0.")
    if lr is not None:
        check_number("local_lr", lr)
        assert isinstance(lr, (int, float))
        if not 0 < lr < math.inf:
            raise ValueError(f"local_lr is the step size of local steps, finite and > 0; got {lr}.")


def check_estimator(estimator: Estimator, local_steps: int) -> None:
    """Refuse local steps of an estimator that remembers the weights at a task's last visit.

    Raises:
        ValueError: with what to use.
    """
    if local_steps > 1 and ESTIMATORS[estimator].averages == "scsc":
        raise ValueError(
            f"estimator {estimator!r} remembers the server's weights at a task's last visit, but local steps visit it "
            f"at others: use estimator 'moml', or local_steps=1; got local_steps={local_steps}."
        )


def check_tasks(tasks: int, workers: int, local_steps: int) -> None:
    """Refuse a number of tasks that workers and local steps do not divide.

    Raises:
        ValueError: with a number that they do.
    """
    if tasks % (workers * local_steps):
        each = workers * local_steps
        raise ValueError(
            f"each of {workers} workers takes {local_steps} local steps on tasks of its own, so the meta-batch must be "
            f"a multiple of {each}; got {tasks} tasks. Use {-(-tasks // each) * each}."
        )


@contextmanager
def replaced(weights: Params, seen: Seen) -> Iterator[None]:
    """Parameters with the values that workers see, in this block; afterwards they are as before, bit for bit."""
    before = [w.detach().clone() for w in weights.values()]
    with torch.no_grad():
        for w, value in zip(weights.values(), unflatten(seen.weights, weights).values(), strict=True):
            w.copy_(value)
    try:
        yield
    finally:
        with torch.no_grad():
            for w, value in zip(weights.values(), before, strict=True):
                w.copy_(value)


class PresentTasks(NamedTuple):
    """The tasks of a step's present workers.

    Attributes:
        workers: the present workers, counted from this process's first.
        positions: of their tasks in this process's batch.
        everyone: which tasks of all processes are those of present workers, booleans ``[T]``.
    """

    workers: list[int]
    positions: Tensor
    everyone: Tensor

    @classmethod
    def of(cls, present: Sequence[int] | None, batch: TaskBatch, workers: int, world: World) -> PresentTasks | None:
        """``None`` if all workers are present."""
        if present is None:
            return None
        total = batch.num_tasks * world.size
        worker_of = torch.arange(total) // (total // workers)
        everyone = torch.isin(worker_of, torch.tensor(present))
        first = world.rank * batch.num_tasks
        mine = world.workers(workers)
        chosen = [worker - mine.start for worker in mine if worker in present]
        return cls(chosen, everyone[first : first + batch.num_tasks].nonzero()[:, 0], everyone)

    def tasks(self, batch: TaskBatch) -> TaskBatch:
        """Their tasks in this process's batch."""
        return TaskBatch(*(mapped(lambda x: x[self.positions.to(x.device)], field) for field in batch))

    def spread(self, values: Tensor, num_tasks: int, fill: float) -> Tensor:
        """Values ``[k, ...]`` of their tasks among those of all tasks of this process, ``[T, ...]``."""
        spread = values.new_full((num_tasks, *values.shape[1:]), fill)
        spread[self.positions.to(values.device)] = values
        return spread


def no_tasks(weights: Params, adapted: Sequence[str]) -> OfTasks:
    """The results of a process without present workers; those of tracked estimators for ``adapted`` parameters."""
    like = next(iter(weights.values()))
    averages = tuple(weights[name].new_zeros(0, *weights[name].shape) for name in adapted)
    return OfTasks(like.new_zeros(0), like.new_zeros(0, 0), averages)
