"""Exchanges of tensors and objects between processes, and the bytes that they send."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from metamom.common.checks import check_word
from metamom.common.choices import SERVERS, Server

T = TypeVar("T")


class ProcessError(RuntimeError):
    """An exchange between processes failed: one of them has died, hangs, or is out of step with the others."""


class Collectives:
    """What the processes exchange. One process exchanges nothing.

    Args:
        rank: this process's number, 0 <= rank < size.
        size: number of processes.
        server: who aggregates (see `World`).
        timeout: seconds > 0 after which waiting for another process is an error.
        group: the processes, if they are not all those of ``torch.distributed``.

    Raises:
        ProcessError: in every method, if a process has died or does not arrive within the time-out.
    """

    def __init__(
        self, rank: int, size: int, server: Server, timeout: float, group: dist.ProcessGroup | None = None
    ) -> None:
        check_word("the server", server, SERVERS)
        self.rank = rank
        self.size = size
        self.server = server
        self.timeout = timeout
        self.group = group
        self.sent = 0
        self._root = 0 if group is None else dist.get_global_rank(group, 0)  # process 0, as torch numbers it

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which have no group of their own, as a copy of a model in DDP."""
        return {**vars(self), "group": None, "_root": 0}

    @property
    def first(self) -> bool:
        """Whether this is process 0, which writes files and shows progress."""
        return self.rank == 0

    def gather(self, tensor: Tensor) -> Tensor:
        """Gather every process's ``[*shape]`` (the same shape on all) into ``[size, *shape]``."""
        if self.size == 1:
            return tensor.unsqueeze(0)
        sent = self._sendable(tensor)
        everyones = sent.new_empty(self.size, *tensor.shape)
        self._call("tensors of all processes", lambda: dist.all_gather([*everyones], sent, group=self.group))
        self.sent += self.size * (self.size - 1) * tensor.nbytes
        return everyones.to(tensor.device)

    def gather_to_server(self, tensor: Tensor) -> Tensor:
        """`gather` on the server. The result on other processes is meaningless."""
        if self.size == 1 or self.server == "replicated":
            return self.gather(tensor)
        out = [torch.empty_like(tensor) for _ in range(self.size)] if self.first else None
        mine, to = tensor.contiguous(), self._root
        self._call("tensors for process 0", lambda: dist.gather(mine, out, dst=to, group=self.group))
        self.sent += (self.size - 1) * tensor.nbytes
        return torch.stack([tensor] if out is None else out)

    def reduce(self, tensor: Tensor) -> Tensor:
        """Sum over all processes in place, on the server (on every process if the server is replicated)."""
        if self.size == 1:
            return tensor
        if self.server == "replicated":
            return self.all_reduce(tensor)
        self._call("a sum", lambda: dist.reduce(tensor, dst=self._root, group=self.group))
        self.sent += (self.size - 1) * tensor.nbytes
        return tensor

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over all processes in place, on every process."""
        if self.size > 1:
            sent = self._sendable(tensor)
            self._call("a sum", lambda: dist.all_reduce(sent, group=self.group))
            if sent is not tensor:
                tensor.copy_(sent)
            self.sent += 2 * (self.size - 1) * tensor.nbytes
        return tensor

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Copy process 0's tensor to every process, in place."""
        if self.size > 1:
            self._call("the server's result", lambda: dist.broadcast(tensor, src=self._root, group=self.group))
            self.sent += (self.size - 1) * tensor.nbytes
        return tensor

    def gather_objects(self, value: T) -> list[T]:
        """Gather every process's object. These bytes are not counted in `sent`."""
        if self.size == 1:
            return [value]
        out: list[Any] = [None] * self.size
        self._call("objects of all processes", lambda: dist.all_gather_object(out, value, group=self.group))
        return out

    def _sendable(self, tensor: Tensor) -> Tensor:
        """A contiguous tensor that the group can send: on the GPU if it has no backend for the CPU (nccl alone)."""
        group = self.group or dist.group.WORLD
        kinds = [] if group is None else [device.type for device in group._device_types]
        there = tensor.device.type in kinds or not kinds
        return tensor.contiguous() if there else tensor.to(kinds[0])

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
