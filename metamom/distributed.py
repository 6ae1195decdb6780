"""The processes that compute the workers' gradients: a single one, or as many as torchrun starts.

    from metamom import distributed

    with distributed.start() as world:
        learner.backward(world.sample(tasks, step, 32), workers=8, bias=TopK(ratio=0.05), world=world)

Processes get contiguous blocks of tasks and workers, so that training does not depend on the number of processes. One
rule keeps the others from waiting forever if one process fails: before they exchange tensors, all processes agree
(`World.agree`) that none has failed, and a process that fails anywhere joins that same agreement.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from metamom.batch import Sampler, TaskBatch, block, drawn
from metamom.common.checks import check_whole, check_word

Server = Literal["replicated", "rank0"]
SERVERS: tuple[Server, ...] = ("replicated", "rank0")
TIMEOUT = 600.0  # default, in seconds; a first compiled step takes minutes
SAME = "Give every process the same arguments and weights: make models after the same torch.manual_seed, or load them."
WEIGHTS_EVERY = 50  # steps between comparisons of the weights, to detect processes that diverge
T = TypeVar("T")


class ProcessError(RuntimeError):
    """An exchange between processes failed: one of them has died, hangs, or is out of step with the others."""


class World:
    """The group of processes, as one of them sees it. Created by `start`; ``World()`` is a single process.

    Args:
        rank: this process's number, 0 <= rank < size.
        size: number of processes.
        server: who aggregates: every process (``"replicated"``), or process 0, which broadcasts the result
            (``"rank0"``).
        timeout: seconds > 0 after which waiting for another process is an error.
        owned: whether `close` destroys the process group.

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
    ) -> None:
        check_word("the server", server, SERVERS)
        self.rank = rank
        self.size = size
        self.server = server
        self.timeout = timeout
        self.sent = 0
        self.doing = ""
        self.status = 0
        self.statuses = [0]
        self._owned = owned
        self._shared: BaseException | None = None
        self._steps = 0

    @property
    def first(self) -> bool:
        """Whether this is process 0, which writes files and shows progress."""
        return self.rank == 0

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
        told = self.gather_objects(None if error is None else _packed(error))[failed[0]]
        self._shared = error if error is not None and self.rank == failed[0] else _unpacked(told)
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
            self._call("an object of process 0", lambda: dist.broadcast_object_list(made, src=0))
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
            told = f" at weights {digest(weights)}" if self._steps % WEIGHTS_EVERY == 0 else ""
            self.doing = what + told
            self._steps += 1

    def _refuse(self, what: str, said: Sequence[object], remedy: str) -> None:
        for rank, other in enumerate(said):
            if other != said[0]:
                self._shared = ValueError(
                    f"the processes differ in {what}: {said[0]} on process 0, {other} on process {rank}. {remedy}"
                )
                raise self._shared

    def gather(self, tensor: Tensor) -> Tensor:
        """Gather every process's ``[*shape]`` (the same shape on all) into ``[size, *shape]``."""
        if self.size == 1:
            return tensor.unsqueeze(0)
        everyones = tensor.new_empty(self.size, *tensor.shape)
        self._call("tensors of all processes", lambda: dist.all_gather([*everyones], tensor.contiguous()))
        self.sent += self.size * (self.size - 1) * tensor.nbytes
        return everyones

    def gather_to_server(self, tensor: Tensor) -> Tensor:
        """`gather` on the server. The result on other processes is meaningless."""
        if self.size == 1 or self.server == "replicated":
            return self.gather(tensor)
        out = [torch.empty_like(tensor) for _ in range(self.size)] if self.first else None
        self._call("tensors for process 0", lambda: dist.gather(tensor.contiguous(), out, dst=0))
        self.sent += (self.size - 1) * tensor.nbytes
        return torch.stack([tensor] if out is None else out)

    def reduce(self, tensor: Tensor) -> Tensor:
        """Sum over all processes in place, on the server (on every process if the server is replicated)."""
        if self.size == 1:
            return tensor
        if self.server == "replicated":
            return self.all_reduce(tensor)
        self._call("a sum", lambda: dist.reduce(tensor, dst=0))
        self.sent += (self.size - 1) * tensor.nbytes
        return tensor

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over all processes in place, on every process."""
        if self.size > 1:
            self._call("a sum", lambda: dist.all_reduce(tensor))
            self.sent += 2 * (self.size - 1) * tensor.nbytes
        return tensor

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Copy process 0's tensor to every process, in place."""
        if self.size > 1:
            self._call("the server's result", lambda: dist.broadcast(tensor, src=0))
            self.sent += (self.size - 1) * tensor.nbytes
        return tensor

    def gather_objects(self, value: T) -> list[T]:
        """Gather every process's object. These bytes are not counted in `sent`."""
        if self.size == 1:
            return [value]
        out: list[Any] = [None] * self.size
        self._call("objects of all processes", lambda: dist.all_gather_object(out, value))
        return out

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

    def _call(self, what: str, collective: Callable[[], object]) -> None:
        try:
            collective()
        except RuntimeError as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ProcessError(
                f"process {self.rank} of {self.size} could not exchange {what} with the others: one of them has "
                f"exited, or did not arrive within the time-out of {self.timeout:g} s (timeout=, --timeout). Check "
                f"the output of the others, and restart all of them from the last checkpoint ({reason})."
            ) from error


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


def start(*, server: Server = "replicated", timeout: float = TIMEOUT) -> World:
    """Join the processes that torchrun has started. Without torchrun, the result is a single process.

    CPU tensors use gloo, GPU tensors use nccl. Each process uses the GPU of its local rank as ``"cuda"``. An existing
    process group is used as it is, and is not destroyed when the world closes.

    Args:
        server: see `World`.
        timeout: seconds > 0 after which waiting for another process is an error.

    Returns:
        A `World`, to use as a context manager: if this process fails inside it, all processes fail.

    Raises:
        ValueError: for an argument out of range, or incomplete torchrun environment variables.
        ProcessError: if the other processes do not arrive within the time-out.

    Example:
        >>> with start() as world:
        ...     world.size
        1
    """
    if not 0 < timeout <= 1e9:
        raise ValueError(f"the time-out must be > 0 and at most 10^9 seconds; got {timeout}.")
    given = dist.is_available() and dist.is_initialized()
    if not given and "RANK" not in os.environ:
        return World(server=server, timeout=timeout)
    World(server=server)  # checks ``server`` before any process waits
    if not given:
        missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise ValueError(
                f"RANK is set, so torchrun should have set {', '.join(missing)} too. Start the processes with "
                "torchrun, or unset RANK."
            )
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
        # Imported here, since torch may be built without torch.distributed. The module below keeps the current process
        # group as a default argument, and torch.compile may import it at any time. If it then keeps our group alive,
        # the group's threads outlast the interpreter and the process may abort at exit. So import it first.
        importlib.import_module("torch.distributed.nn.functional")
        from torch.distributed.rendezvous import rendezvous

        try:
            store, rank, size = next(rendezvous("env://", timeout=timedelta(seconds=timeout)))
            store.set_timeout(timedelta(seconds=timeout))
            # After a restart on one machine, torchrun's store still holds the old processes' addresses (pytorch issue
            # 135712). With several machines, each counts restarts separately, but --rdzv-backend c10d makes a new store
            if os.environ.get("GROUP_WORLD_SIZE") == "1":
                restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
                store = dist.PrefixStore(f"restart {restarts}", store)  # type: ignore[attr-defined]
            dist.init_process_group(
                backend, store=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout)
            )
        except (RuntimeError, ValueError) as error:
            raise ProcessError(
                f"process {os.environ['RANK']} of {os.environ['WORLD_SIZE']} could not join the others at "
                f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} within {timeout:g} s: {error}"
            ) from error
    return World(dist.get_rank(), dist.get_world_size(), server=server, timeout=timeout, owned=not given)


def digest(tensors: Iterable[Tensor]) -> str:
    """A short hash of the tensors, which changes if any bit does."""
    found = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        found.update(str((tuple(tensor.shape), tensor.dtype)).encode())
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _packed(error: Exception) -> bytes:
    """Serialise an error for the other processes: pickled, or rebuilt from its type, message and attributes."""
    if not isinstance(error, StopIteration):  # it would end a generator that raises it
        for told in (error, (type(error), str(error), dict(vars(error)))):
            try:
                packed = pickle.dumps(told)
                copy = _unpacked(packed)
            except Exception:  # noqa: BLE001 - pickling it may raise anything: send its text instead
                continue
            if type(copy) is type(error) and str(copy) == str(error):
                return packed
    return pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))


def _unpacked(packed: bytes | None) -> Exception:
    assert packed is not None
    told = pickle.loads(packed)
    if isinstance(told, Exception):
        return told
    kind, message, attributes = told
    error: Exception = kind.__new__(kind, message)
    error.args = (message,)
    vars(error).update(attributes)
    return error
