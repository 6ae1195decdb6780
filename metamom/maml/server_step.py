"""One step of the server: bias and aggregate the workers' meta-gradients, and hand the result on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from metamom.batch import TaskBatch
from metamom.bias import Bias, BiasOperator, Layout, NonFiniteError, as_operator
from metamom.bias.checks import all_finite
from metamom.common.trees import Tree, leaves
from metamom.distributed import World
from metamom.maml.batch_checks import refuse_non_finite
from metamom.maml.gradient import MetaGradients, OfTasks
from metamom.maml.not_finite import not_finite
from metamom.maml.task_weights import Params
from metamom.server.aggregate import Aggregation, deliver, unflatten
from metamom.server.robust import Aggregate


class Backward(NamedTuple):
    """The result of `MAML.backward`.

    Attributes:
        loss: mean query loss over the tasks, a 0-d tensor without a graph.
        metrics: ``accuracy`` (on the query sets; ``None`` for regression), ``grad_norm`` (of the aggregate),
            ``bias_error`` (how far the operator moved the mean gradient, relative to that gradient's norm; ``None``
            if it was not measured), ``wire_bytes`` (of the workers' messages to the server) and ``sent_bytes``
            (the total that all processes sent each other in this step; see `metamom.distributed.World`).
    """

    loss: Tensor
    metrics: dict[str, float | int | None]


def server_step(
    gradients: MetaGradients,
    weights: Params,
    batch: TaskBatch,
    *,
    workers: int,
    bias: Bias,
    aggregate: Aggregate,
    world: World,
    measure: bool,
    check_finite: bool,
    accuracy: Callable[[Tensor, Tree, Tensor | None], Tensor | None],
    take: Callable[[Params, BiasOperator | None], None] | None = None,
) -> Backward:
    """Add ``1/n sum_i C(g_i)`` to the ``.grad`` of the weights; arguments as of `MAML.backward`.

    Args:
        gradients: the workers' gradients.
        weights: the meta-parameters by name.
        accuracy: computes the tasks' accuracies from predictions ``[T, Q, ...]`` and targets.
        take: gets that gradient, and the operator, instead of ``.grad``.
    """
    sent = world.sent
    with world.together():
        gradients.plan().check(batch)
        first = world.rank * batch.num_tasks
        if world.size > 1:
            operator, shapes = as_operator(bias), [tuple(x.shape) for x in leaves(tuple(batch[:4]))]
            what = f"bias={'none' if operator is None else operator.spec}, aggregate={aggregate}, measure={measure}"
            world.step(f"a step of workers={workers}, {what}, batches of {shapes}", weights.values())
        server = Aggregation(
            workers, bias, aggregate, sizes=Layout(w.shape for w in weights.values()), world=world, measure=measure
        )
        try:
            tasks = _to_server(server, gradients, weights, batch, world.workers(workers), first)
        except NonFiniteError as error:
            if not check_finite:
                raise
            with torch.no_grad():
                own = gradients.losses(weights, batch)
            raise not_finite(gradients.plan(), weights, batch, own, first) from error
        right = accuracy(tasks.predictions, batch.query_y, batch.query_mask)
    outcomes = world.gather(torch.stack([tasks.losses] if right is None else [tasks.losses, right.to(tasks.losses)]))
    losses, *shares = outcomes.transpose(0, 1).flatten(1)
    finite = all_finite(losses)
    if not finite:
        _refuse(gradients, weights, batch, tasks.losses, losses, first, world, check_finite)
    total, report = server.finish()
    norm = report["grad_norm"]
    if not (norm is not None and math.isfinite(norm)) and finite and not all_finite(total):
        _refuse(gradients, weights, batch, tasks.losses, losses, first, world, check_finite)
    gradient = unflatten(total, weights)
    if take is not None:
        take(gradient, server.operator)
    else:
        for name, parameter in weights.items():
            deliver(parameter, gradient[name], server.operator, add=True)
    if tasks.averages:
        assert batch.task_ids is not None
        everyones = [world.gather(u).flatten(0, 1) for u in tasks.averages]
        gradients.plan().remember(world.gather(batch.task_ids).flatten(), everyones, total, losses)
    return Backward(losses.mean(), {"accuracy": _mean(shares), **report, "sent_bytes": world.sent - sent})


def _refuse(
    gradients: MetaGradients,
    weights: Params,
    batch: TaskBatch,
    own: Tensor,
    everyones: Tensor,
    first: int,
    world: World,
    check_finite: bool,
) -> None:
    """Raise the error for losses or gradients that are not finite, on all processes.

    Args:
        own: the losses of this process's tasks.
        everyones: the losses of all tasks.
        check_finite: whether to raise one if the data is finite.
    """
    with world.together():
        refuse_non_finite(batch, first)
    if check_finite:
        with world.together():
            if all_finite(everyones) or not all_finite(own):  # else another process has the task
                raise not_finite(gradients.plan(), weights, batch, own, first)


def _mean(shares: Sequence[Tensor]) -> float | None:
    """The mean over tasks with at least one label that counts; ``None`` without such a task."""
    mean = float(shares[0].nanmean()) if shares else math.nan
    return None if math.isnan(mean) else mean


def _to_server(
    server: Aggregation, gradients: MetaGradients, weights: Params, batch: TaskBatch, mine: range, first: int
) -> OfTasks:
    """Send the gradients of this process's workers to the server, and return the results of their tasks."""
    found, done = [], 0
    for rows, tasks in gradients.by_worker(weights, batch, len(mine), first):
        try:
            server.add(rows, mine[done : done + len(rows)])
        except NonFiniteError:
            refuse_non_finite(batch, first)
            raise
        done += len(rows)
        found.append(tasks)
    return OfTasks.joined(found)
