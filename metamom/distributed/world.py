"""The processes as one of them sees them: its share of the work, and agreement before anything is exchanged."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from metamom.batch import Sampler, TaskBatch, block, drawn
from metamom.common.checks import check_whole
from metamom.common.choices import TIMEOUT, Server
from metamom.distributed.collectives import Collectives, ProcessError
from metamom.distributed.messages import digest, pack_error, unpack_error

SAME = "Give every process the same arguments and weights: make models after the same torch.manual_seed, or load them."
"""What an error advises if processes differ."""
WEIGHTS_EVERY = 50
"""Steps between comparisons of the weights, to detect processes that diverge."""
T = TypeVar("T")


class World(Collectives):
    """The group of processes, as one of them sees it. Created by `start`; ``World()`` is a single process.

    Args:
        rank: this process's number, 0 <= rank < size.
        size: number of processes.
        server: who aggregates: every process (``"replicated"``), or process 0, which broadcasts the result
            (``"rank0"``).
        timeout: seconds > 0 after which waiting for another process is an error.
        owned: whether `close` destroys the process group.
        group: the processes, if they are not all those of ``torch.distributed``.

    Attributes:
        sent: total bytes that all processes have sent each other so far: agreements, losses and gradients. Each
            exchange counts the minimum that it must send (``2 (n-1) p`` for an all-reduce of p bytes by n processes).
        doing: what this process is about to do, in words. `agree` raises an error if processes differ in it.
        status: a whole number to send to the other processes with the next agreement.
        statuses: the status of every process at the last agreement.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        *,
        server: Server = "replicated",
        timeout: float = TIMEOUT,
        owned: bool = False,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(rank, size, server, timeout, group)
        self.doing = ""
        self.status = 0
        self.statuses = [0]
        self._owned = owned
        self._shared: BaseException | None = None
        self._steps = 0

    def sample(self, sampler: Sampler, step: int, num_tasks: int) -> TaskBatch:
        """Sample this process's block of the meta-batch of ``num_tasks`` tasks for ``step``.

        Raises:
            ValueError: if the number of processes does not divide ``num_tasks``.
            TypeError: if the sampler does not return a `TaskBatch`, or cannot return parts to several processes.
        """
        return drawn(sampler, step, num_tasks, self.rank, self.size)

    def workers(self, n: int) -> range:
        """This process's block of n workers. If there are fewer workers than processes, the one worker it shares.

        Raises:
            TypeError: if n is not a whole number.
            ValueError: if n is below 1, or if neither n nor the number of processes divides the other.
        """
        n = check_whole("the number of workers", n, 1)
        if n % self.size and self.size % n:
            raise ValueError(
                f"workers are dealt to {self.size} processes: their number must be a multiple of {self.size}, or "
                f"divide it (several processes then share one worker); got {n}."
            )
        if n < self.size:
            shared = self.rank * n // self.size
            return range(shared, shared + 1)
        return block(n, self.rank, self.size)

    def agree(self, error: Exception | None = None) -> None:
        """Wait for all processes, and continue only if none of them has failed.

        Args:
            error: this process's failure.

        Raises:
            Exception: the failure of the lowest-numbered process that failed, the same on all processes.
            ValueError: if processes are `doing` different things, the same on all processes.
            ProcessError: if a process has died or does not arrive within the time-out.
        """
        if self.size == 1:
            self.statuses = [self.status]
            if error is not None:
                raise error
            return
        try:
            doing = int.from_bytes(hashlib.blake2b(self.doing.encode(), digest_size=7).digest(), "little")
            said = self.gather(torch.tensor([error is not None, self.status, doing], dtype=torch.int64)).tolist()
        except ProcessError:
            if error is not None:  # the others cannot be reached
                raise error from None
            raise
        self.statuses = [word for _, word, _ in said]
        failed = [rank for rank, (is_failed, _, _) in enumerate(said) if is_failed]
        differ = any(other != said[0][2] for _, _, other in said)
        if not failed and not differ:
            return
        # a process may have failed before it set `doing`, so all reset it
        did, self.doing, self._steps = self.doing, "", 0
        if not failed:
            self._refuse("what they do", self.gather_objects(did), SAME)
        first = self.gather_objects(None if error is None else pack_error(error))[failed[0]]
        assert first is not None
        self._shared = error if error is not None and self.rank == failed[0] else unpack_error(first)
        raise self._shared

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block in which one process may fail. At its end, all agree or all raise the same error.

        Raises:
            Exception: as `agree`.
        """
        try:
            yield
        except Exception as error:
            if not self._has_shared(error):
                self.agree(error)
            raise
        self.agree()

    def broadcast_object(self, make: Callable[[], T]) -> T:
        """Call ``make`` on process 0 and return its result on all processes.

        Raises:
            Exception: the error that ``make`` raises, on all processes.
        """
        with self.together():
            made = [make() if self.first else None]
        if self.size > 1:
            self._call(
                "an object of process 0", lambda: dist.broadcast_object_list(made, src=self._root, group=self.group)
            )
        return made[0]  # type: ignore[return-value]

    def check_same(self, what: str, value: object, remedy: str) -> None:
        """Raise an error if processes differ in a value that must be the same.

        Args:
            what: the name of the value, for the error.
            value: this process's value, or a function that returns it; use `digest` for tensors.
            remedy: what to do, for the error.

        Raises:
            ValueError: on all processes, naming the first that differs from process 0.
        """
        if self.size == 1:
            return
        with self.together():
            value = value() if callable(value) else value
        self._refuse(what, self.gather_objects(value), remedy)

    def step(self, what: str, weights: Iterable[Tensor]) -> None:
        """Set `doing` to a step with these arguments and, every `WEIGHTS_EVERY` steps, a digest of these weights."""
        if self.size > 1:
            at = f" at weights {digest(weights)}" if self._steps % WEIGHTS_EVERY == 0 else ""
            self.doing = what + at
            self._steps += 1

    def _refuse(self, what: str, said: Sequence[object], remedy: str) -> None:
        for rank, other in enumerate(said):
            if other != said[0]:
                self._shared = ValueError(
                    f"the processes differ in {what}: {said[0]} on process 0, {other} on process {rank}. {remedy}"
                )
                raise self._shared

    def close(self) -> None:
        """Leave the group. No process may still need this one."""
        if self._owned and dist.is_initialized():
            dist.destroy_process_group()

    def __enter__(self) -> World:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        try:
            if error is None or (isinstance(error, Exception) and not self._has_shared(error)):
                self.agree(error)
        finally:
            self.close()

    def _has_shared(self, error: BaseException | None) -> bool:
        """Whether the other processes know of this error, or cannot be reached."""
        while error is not None:
            if error is self._shared or isinstance(error, ProcessError):
                return True
            error = error.__cause__
        return False


def as_world(world: World | None) -> World:
    """Resolve an argument ``world``; ``None`` means a single process.

    Raises:
        TypeError: for anything but a `World`.
    """
    if world is None:
        return World()
    if not isinstance(world, World):
        raise TypeError(f"world is what metamom.distributed.start() returns; got {world!r:.80}.")
    return world
