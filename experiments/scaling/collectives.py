"""Seconds of a step's collectives, by size.

Each is called as in a step. A collective that ends or begins at process 0 does not wait for the other processes, so
gather and broadcast are timed together, as in a step with a server.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from metamom.distributed import World
from metamom.experiments.scaling import model
from metamom.experiments.scaling.model import Exchange

KINDS = ("all-reduce", "all-gather", "gather and broadcast", "reduce and broadcast")


def cost(kind: str, n: int, size: int) -> Exchange:
    """The model's cost of a collective with ``size`` bytes from each of n processes."""
    if kind == "all-reduce":
        return model.all_reduce(n, size)
    if kind == "all-gather":
        return model.all_gather(n, size)
    to_server = model.gather(n, size) if kind == "gather and broadcast" else model.reduce(n, size)
    return to_server + model.broadcast(n, size)


def measure(sizes: Sequence[int], repeats: int, world: World) -> list[dict[str, Any]]:
    """Seconds of each kind by size in bytes, as JSON values."""
    server = World(world.rank, world.size, server="rank0")
    calls: dict[str, Callable[[Tensor], object]] = {
        "all-reduce": world.all_reduce,
        "all-gather": world.gather,
        "gather and broadcast": lambda x: (server.gather_to_server(x), server.broadcast(x)),
        "reduce and broadcast": lambda x: (server.reduce(x), server.broadcast(x)),
    }
    found: dict[tuple[str, int], list[float]] = {}
    rounds = range(-1, repeats)  # the first call is not counted
    for number in tqdm(rounds, desc="collectives", leave=False, disable=None if world.first else True):
        for size in sizes:
            for kind in KINDS:
                tensor = torch.zeros(size // 4)  # other values would overflow in sums
                world.agree()
                begin = time.perf_counter()
                calls[kind](tensor)
                if number >= 0:
                    found.setdefault((kind, size), []).append(time.perf_counter() - begin)
    return [
        {"kind": kind, "size": size, "processes": world.size, "seconds": seconds}
        for (kind, size), seconds in found.items()
    ]
