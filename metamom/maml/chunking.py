"""How many tasks to compute at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from metamom.batch import TaskBatch

ChunkSize = int | Literal["auto"] | None

BUDGET = 512 * 2**20  # bytes, on a CPU
# Saved activations and their cotangents are alive together at the peak of a backward pass.
PEAK = 2.3


def spans(num_tasks: int, chunk_size: int | None, per_worker: int) -> Iterator[tuple[int, int]]:
    """Cut 0..T into spans of at most ``chunk_size`` tasks, each of whole workers or within one worker.

    They are as few as can be, and but for the last (of each worker, if they are within one) equal, and as short as that
    allows: 10 at most 4 at a time are 4, 4, 2. A compiled meta-gradient is compiled once for each size.
    """
    size = num_tasks if chunk_size is None else chunk_size
    if size >= per_worker:
        workers = num_tasks // per_worker
        yield from ((a * per_worker, b * per_worker) for a, b in _equal(0, workers, size // per_worker))
        return
    for first in range(0, num_tasks, per_worker):
        yield from _equal(first, first + per_worker, size)


def _equal(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    """start..stop in the fewest spans of at most ``size``: all of one length but the last, which may be shorter."""
    count = -(-(stop - start) // size)
    size = -(-(stop - start) // count)
    yield from ((a, min(a + size, stop)) for a in range(start, stop, size))


def tasks_within_budget(gradient: Callable[[], Any], one: TaskBatch) -> int:
    """How many tasks' meta-gradients fit into the budget: `BUDGET` on a CPU, half of what is free on a GPU.

    Args:
        gradient: computes one task's, once.
        one: that task.
    """
    sizes: dict[int, int] = {}

    def note(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        sizes[storage.data_ptr()] = max(sizes.get(storage.data_ptr(), 0), storage.nbytes())
        return saved

    device = one.support_x.device
    drawn = [device] if device.type == "cuda" else []  # a model may draw: that must not be felt
    with (
        torch.random.fork_rng(devices=drawn),
        torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved),
    ):
        gradient()
    each = sum(sizes.values()) + sum(x.nbytes for x in one[:4])
    budget = torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else BUDGET
    return max(1, int(budget / (PEAK * each)))
