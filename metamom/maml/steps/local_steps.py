"""Several meta-steps on each worker between two averages, as in Per-FedAvg.

Legend: n workers, k of them present, H local steps, m tasks of a worker in each, d entries of all meta-parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from metamom.batch import TaskBatch
from metamom.common.trees import mapped
from metamom.maml.chunk_results import OfTasks, OfWorkers
from metamom.maml.gradient import MetaGradients
from metamom.maml.task_weights import Params
from metamom.server.aggregate import unflatten


def local_meta_steps(
    start: Params, gradient: Callable[[int, Params], Tensor], steps: int, lr: float
) -> tuple[Tensor, Params]:
    """Each worker's own meta-steps ``w_i <- w_i - lr * g_i(w_i)``, as a pure function of stacked weights.

    Args:
        start: the workers' weights ``{name: [k, *shape]}``.
        gradient: ``(local step, weights {name: [k, *shape]}) -> [k, d]``, the meta-gradients on that step's tasks.
        steps: H >= 1.
        lr: the local step size, > 0.

    Returns:
        ``(sums [k, d], weights {name: [k, *shape]})``: the sum of each worker's gradients, which is the difference of
        its weights divided by ``lr``; and the weights before the last step.

    Example:
        >>> start = {"w": torch.tensor([[1.0], [2.0]])}
        >>> local_meta_steps(start, lambda step, weights: weights["w"], steps=2, lr=0.5)[0]
        tensor([[1.5000],
                [3.0000]])

    Reference:
        Fallah, Mokhtari, Ozdaglar, "Personalized Federated Learning: A Meta-Learning Approach", 2020, arXiv 2002.07948,
        algorithm 1.
    """
    weights = start
    like = {name: w[0] for name, w in start.items()}
    total = gradient(0, weights)
    rows = total
    for step in range(1, steps):
        moves = unflatten(rows, like)
        weights = {name: w - lr * moves[name] for name, w in weights.items()}
        rows = gradient(step, weights)
        total = total + rows
    return total, weights


def by_worker_locally(
    gradients: MetaGradients,
    weights: Params,
    batch: TaskBatch,
    workers: int,
    number: int,
    present: Sequence[int] | None,
    steps: int,
    lr: float,
) -> Iterator[OfWorkers]:
    """As `MetaGradients.by_worker`, with the sums of each worker's gradients over its local steps.

    The T/n tasks of a worker are its H local steps' tasks in turn, T/(n H) for each.

    Args:
        gradients: computes meta-gradients.
        weights: the meta-parameters by name.
        batch: T tasks, a multiple of n H.
        workers: n.
        number: the index of the first task in the batch of all processes.
        present: the workers to compute; all by default.
        steps: H >= 1.
        lr: the local step size.
    """
    everyone = range(workers) if present is None else present
    if not everyone:
        return
    each = batch.num_tasks // (workers * steps)
    found: list[OfTasks] = []

    def gradient(step: int, stacked: Params) -> Tensor:
        index = torch.tensor([(i * steps + step) * each + j for i in range(workers) for j in range(each)])
        tasks = TaskBatch(*(mapped(lambda x: x[index.to(x.device)], field) for field in batch))
        own = stacked if step else None  # the first step is at the meta-parameters, as without local steps
        parts = gradients.by_worker(weights, tasks, workers, number // steps, present=present, starts=own)
        rows, of_tasks = zip(*parts, strict=True)
        found.append(OfTasks.joined(of_tasks))
        return torch.cat(rows) if len(rows) > 1 else rows[0]

    start = {name: w.detach().expand(len(everyone), *w.shape) for name, w in weights.items()}
    total, _ = local_meta_steps(start, gradient, steps, lr)

    def in_order(parts: Sequence[Tensor]) -> Tensor:
        """Results of the steps, ``[k m, ...]`` each, in the order of the batch, ``[k H m, ...]``."""
        return torch.stack([part.reshape(len(everyone), each, *part.shape[1:]) for part in parts], 1).flatten(0, 2)

    tasks = OfTasks(
        in_order([part.losses for part in found]),
        in_order([part.predictions for part in found]),
        tuple(in_order(parts) for parts in zip(*(part.averages for part in found), strict=True)),
    )
    yield OfWorkers(total, tasks)
