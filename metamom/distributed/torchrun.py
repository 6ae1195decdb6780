"""Join the processes that torchrun has started."""

from __future__ import annotations

import importlib
import os
from datetime import timedelta

import torch
import torch.distributed as dist

from metamom.common.choices import TIMEOUT, Server
from metamom.distributed.collectives import ProcessError
from metamom.distributed.world import World


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
        _join(timeout)
    return World(dist.get_rank(), dist.get_world_size(), server=server, timeout=timeout, owned=not given)


def _join(timeout: float) -> None:
    """Make the process group that torchrun's environment variables describe."""
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
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout))
    except (RuntimeError, ValueError) as error:
        raise ProcessError(
            f"process {os.environ['RANK']} of {os.environ['WORLD_SIZE']} could not join the others at "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} within {timeout:g} s: {error}"
        ) from error
