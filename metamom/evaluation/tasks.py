"""The tasks of an evaluation, a block at a time, shared among processes."""

from __future__ import annotations

from collections.abc import Iterator

from metamom.batch import Sampler, TaskBatch, drawn, takes_blocks
from metamom.distributed import World
from metamom.maml.checks.batch_checks import check_batch

BLOCK = 50  # tasks drawn and computed together


def blocks_of_tasks(source: Sampler, tasks: int, world: World) -> Iterator[tuple[int, TaskBatch | None, int]]:
    """The parts that this process evaluates: the index of the first task, the part, and how many tasks are done then.

    Other processes evaluate theirs meanwhile. The last part may be ``None``, where none is left for this process.
    Parts are blocks of one meta-batch, as for processes. So the tasks do not depend on how many are computed together,
    or where. The whole meta-batch is drawn at once if the number of tasks has no divisor of a reasonable size (a
    prime, say), or if the sampler cannot return parts.
    """
    numbers = range(-(-tasks // BLOCK), tasks // max(1, BLOCK // 4) + 1)
    fair = (n for n in numbers if tasks % n == 0)
    blocks = next(fair, 1) if takes_blocks(source) else 1
    size = min(BLOCK, tasks // blocks)
    whole = None
    for number in range(world.rank, world.rank + -(-tasks // size), world.size):
        first, after = number * size, min(tasks, (number - world.rank + world.size) * size)
        if first >= tasks:
            yield first, None, after
            continue
        if whole is None and blocks > 1:
            part = drawn(source, 0, tasks, number, blocks, or_all=world.size == 1)
            if part.num_tasks < tasks:
                yield first, part, after
                continue
            whole = part  # the sampler accepts rank and world_size but ignores them
        if whole is None:
            whole = drawn(source, 0, tasks)
        check_batch(whole)
        if whole.num_tasks != tasks:
            raise ValueError(f"the sampler must return {tasks} tasks; got a batch of {whole.num_tasks}.")
        yield first, whole.part(first, first + size), after
