"""Meta-batches for trainers that iterate over a `torch.utils.data.DataLoader`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import distributed
from torch.utils.data import IterableDataset, get_worker_info

from metamom.batch import Sampler, TaskBatch, check_sampler, drawn, of_stream
from metamom.common.checks import check_whole


class MetaBatches(IterableDataset[TaskBatch]):
    """A sampler's meta-batches of successive steps, as a data set for a `torch.utils.data.DataLoader`.

    Give the loader ``batch_size=None``, since an item is a whole meta-batch. Within a process group of
    `torch.distributed`, each process gets its own block of every step's tasks, so together they see the tasks that one
    process alone would see: a trainer must not deal the items to the processes once more (as an
    `torch.utils.data.IterableDataset`, Lightning does not). Workers of the loader draw their share of the steps.

    Args:
        sampler: the tasks.
        meta_batch: tasks a step, over all processes.
        steps: the number of steps in a pass, > 0.
        start: the first step of the next pass; a function is asked at the start of each.
        stream: which independent stream of tasks to draw from, such as ``"validation"``.

    Raises:
        TypeError: for anything but a sampler.
        ValueError: for a number out of range.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> from metamom.tasks import Sinusoid
        >>> loader = DataLoader(MetaBatches(Sinusoid(), meta_batch=8, steps=2), batch_size=None)
        >>> [batch.num_tasks for batch in loader]
        [8, 8]
    """

    def __init__(
        self,
        sampler: Sampler,
        *,
        meta_batch: int,
        steps: int,
        start: int | Callable[[], int] = 0,
        stream: str = "train",
    ) -> None:
        check_sampler(sampler, "MetaBatches needs a sampler, which")
        self.sampler = of_stream(sampler, stream)
        self.meta_batch = check_whole("meta_batch", meta_batch, 1)
        self.steps = check_whole("steps", steps, 1)
        self.start = start

    def __iter__(self) -> Iterator[TaskBatch]:
        rank, size = place()
        worker = get_worker_info()
        own, every = (0, 1) if worker is None else (worker.id, worker.num_workers)
        start = self.start() if callable(self.start) else self.start
        for step in range(start + own, start + self.steps, every):
            yield drawn(self.sampler, step, self.meta_batch, rank, size)


def place() -> tuple[int, int]:
    """The number of this process in `torch.distributed`'s process group, and how many there are."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()
