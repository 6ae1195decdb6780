"""Messages between single processes, without the others."""

from __future__ import annotations

from collections.abc import Mapping

import torch.distributed as dist
from torch import Tensor

from metamom.distributed.collectives import Collectives


def exchange(world: Collectives, sends: Mapping[int, Tensor], receives: Mapping[int, Tensor], total: int) -> None:
    """Send a tensor to each of some processes and receive one from each of some, all at the same time.

    Processes that exchange nothing take no part. Where i sends to j, j must receive from i a tensor of that shape and
    dtype in the same call.

    Args:
        world: the processes.
        sends: the tensor for each process.
        receives: the tensor to write into, from each process.
        total: bytes that all processes send in this call, for ``world.sent``.

    Raises:
        ProcessError: if one of these processes has died or does not arrive within the time-out.
    """
    if world.size == 1:
        return
    arriving = {peer: world._sendable(tensor) for peer, tensor in receives.items()}
    operations = [_operation(world, dist.irecv, tensor, peer) for peer, tensor in arriving.items()]
    operations += [_operation(world, dist.isend, world._sendable(tensor), peer) for peer, tensor in sends.items()]

    def all_at_once() -> None:
        for work in dist.batch_isend_irecv(operations) if operations else []:
            work.wait()

    world._call("messages with its neighbours", all_at_once)
    for peer, tensor in receives.items():
        if arriving[peer] is not tensor:
            tensor.copy_(arriving[peer])
    world.sent += total


def _operation(world: Collectives, kind: object, tensor: Tensor, peer: int) -> dist.P2POp:
    to = peer if world.group is None else dist.get_global_rank(world.group, peer)
    return dist.P2POp(kind, tensor, to, group=world.group)  # type: ignore[arg-type]
