"""How many tasks to compute at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from metamom.batch import TaskBatch
from metamom.common.choices import ChunkSize as ChunkSize
from metamom.common.trees import device_of, leaves
from metamom.nets.linear import as_of_many_tasks
from metamom.nets.low_rank import LowRank, parts

BUDGET = 256 * 2**20  # bytes, on a CPU: more is slower, since activations leave its caches
# At the peak of a backward pass, saved activations and their cotangents are both alive.
PEAK = 2.3
# A step reads and writes each task's weights and their gradients about this often: they should stay in the caches too.
WEIGHT_PASSES = 12
UNKNOWN = 16  # tasks at a time if their memory cannot be measured


def spans(num_tasks: int, chunk_size: int | None, per_worker: int) -> Iterator[tuple[int, int]]:
    """Cut 0..T into spans of at most ``chunk_size`` tasks. Each span holds whole workers, or lies within one worker.

    There are as few spans as possible. All but the last (of each worker, if they lie within one) have the same length,
    which is as short as that allows: 10 tasks, at most 4 at a time, are cut into 4, 4, 2. A meta-gradient is compiled
    once for each length.
    """
    size = num_tasks if chunk_size is None else chunk_size
    if size >= per_worker:
        workers = num_tasks // per_worker
        yield from ((a * per_worker, b * per_worker) for a, b in _equal(0, workers, size // per_worker))
        return
    for first in range(0, num_tasks, per_worker):
        yield from _equal(first, first + per_worker, size)


def _equal(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    """Cut start..stop into the fewest spans of at most ``size``, all of one length but for a shorter last one."""
    count = -(-(stop - start) // size)
    size = -(-(stop - start) // count)
    yield from ((a, min(a + size, stop)) for a in range(start, stop, size))


def tasks_within_budget(gradient: Callable[[], Any], one: TaskBatch, weights: int) -> int:
    """How many tasks' meta-gradients fit into the budget: `BUDGET` on a CPU, half of the free memory on a GPU.

    Args:
        gradient: computes the meta-gradient of one task.
        one: that task.
        weights: bytes of one task's weights.
    """
    sizes: dict[int, int] = {}
    thin: dict[int, int] = {}  # bytes of weights that are kept as thin factors

    def note(saved: Tensor) -> Tensor:
        tensor = saved
        while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            tensor = torch._C._functorch.get_unwrapped(tensor)
        for part in (dense for each in parts(tensor) for dense in _with_storage(each)):
            storage = part.untyped_storage()
            sizes[storage.data_ptr()] = max(sizes.get(storage.data_ptr(), 0), storage.nbytes())
        if isinstance(tensor, LowRank) and tensor.base is not None and tensor.is_thin():
            thin[tensor.base.data_ptr()] = tensor.base.nbytes
        return saved

    device = device_of(one.support_x)
    drawn = [device] if device.type == "cuda" else []  # restore the generator, since a model may draw from it
    with (
        torch.random.fork_rng(devices=drawn),
        torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved),
        as_of_many_tasks(),
    ):
        try:
            gradient()
        except (RuntimeError, ValueError) as error:
            if "saved tensor hooks" not in str(error):
                raise
            return UNKNOWN  # torch.func.grad in the forward does not allow such hooks
    each = sum(sizes.values()) + sum(x.nbytes for x in leaves(tuple(one[:4])))
    if device.type == "cuda":
        return max(1, int(torch.cuda.mem_get_info(device)[0] // 2 / (PEAK * each)))
    return max(1, int(BUDGET / (PEAK * max(each, WEIGHT_PASSES * (weights - sum(thin.values()))))))


def _with_storage(tensor: Tensor) -> Sequence[Tensor]:
    """The tensors whose memory holds it.

    None for zeros that are not stored, as the tangents of constants, and for what stands for tensors while `torch.cond`
    or `torch.compile` traces a part of the model.
    """
    if tensor._is_zerotensor() or isinstance(tensor, (FakeTensor, FunctionalTensor)):
        return ()
    if is_traceable_wrapper_subclass(outer := cast(Any, tensor)):  # such as nested tensors
        names, _ = outer.__tensor_flatten__()
        return [part for name in names for part in _with_storage(getattr(outer, name))]
    if tensor.layout is torch.sparse_coo:
        return tensor._indices(), tensor._values()
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return tensor.crow_indices(), tensor.col_indices(), tensor.values()
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return tensor.ccol_indices(), tensor.row_indices(), tensor.values()
    return (tensor,)
