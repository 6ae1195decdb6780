"""One step of the server: bias and aggregate the workers' meta-gradients, and hand the result on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metamom.batch import TaskBatch
from metamom.bias import Bias, BiasOperator, Layout, NonFiniteError, as_operator
from metamom.bias.checks import all_finite
from metamom.common.trees import Tree, leaves
from metamom.distributed import World
from metamom.maml.checks.batch_checks import refuse_non_finite
from metamom.maml.checks.not_finite import not_finite
from metamom.maml.chunk_results import OfTasks
from metamom.maml.gradient import MetaGradients
from metamom.maml.plan import Plan
from metamom.maml.steps.federation import Federation, PresentTasks, check_estimator, no_tasks
from metamom.maml.steps.local_steps import by_worker_locally
from metamom.maml.task_weights import Params
from metamom.maml.under_vmap.draws import Step
from metamom.server.aggregate import Aggregation, deliver, unflatten
from metamom.server.robust import AnyAggregate

ALL_PRESENT = Federation()


class Backward(NamedTuple):
    """The result of `MAML.backward`.

    Attributes:
        loss: mean query loss over the tasks, a 0-d tensor without a graph.
        metrics: ``accuracy`` (on the query sets; ``None`` for regression), ``grad_norm`` (of the aggregate),
            ``bias_error`` (how far the operator moved the mean gradient, relative to that gradient's norm; ``None``
            if it was not measured), ``wire_bytes`` (of the workers' messages to the server) and ``sent_bytes``
            (the total that all processes sent each other in this step; see `metamom.distributed.World`). With absent
            workers, loss and metrics are those of the present ones. With ``down_bias``, also ``wire_bytes_down`` (of
            the server's messages to all workers).
    """

    loss: Tensor
    metrics: dict[str, float | int | None]


class Exchange(NamedTuple):
    """What a step does besides its usual way from the workers' gradients to ``.grad``.

    Attributes:
        take: gets the gradient, and the operator, instead of ``.grad``.
        changes: of the momenta of this process's workers, ``[k, d]``, given their gradients ``[k, d]``; not with absent
            workers or local steps.
    """

    take: Callable[[Params, BiasOperator | None], None] | None = None
    changes: Callable[[Tensor], Tensor] | None = None


USUAL = Exchange()


def server_step(
    gradients: MetaGradients,
    weights: Params,
    batch: TaskBatch,
    *,
    workers: int,
    bias: Bias,
    aggregate: AnyAggregate,
    world: World,
    measure: bool,
    check_finite: bool,
    accuracy: Callable[[Tensor, Tree, Tensor | None], Tensor | None],
    federation: Federation = ALL_PRESENT,
    exchange: Exchange = USUAL,
) -> Backward:
    """Add ``1/n sum_i C(g_i)`` to the ``.grad`` of the weights; arguments as of `MAML.backward`.

    Args:
        gradients: the workers' gradients.
        weights: the meta-parameters by name.
        accuracy: computes the tasks' accuracies from predictions ``[T, Q, ...]`` and targets.
        federation: absent workers, their weights, and local steps; its message to the workers is the caller's.
        exchange: what takes the place of ``.grad``, and moves the workers' momenta.
    """
    sent = world.sent
    with world.together():
        plan = gradients.plan()
        plan.check(batch)
        check_estimator(plan.problem.estimator, federation.local_steps)
        federation.check(batch.num_tasks * world.size, workers, world)
        first, present = world.rank * batch.num_tasks, federation.present(workers)
        if world.size > 1:
            shapes = [tuple(x.shape) for x in leaves(tuple(batch[:4]))]
            what = f"{_spec(bias)}, aggregate={aggregate}, measure={measure}{federation.described()}"
            world.step(f"a step of workers={workers}, bias={what}, batches of {shapes}", weights.values())
        # only operators need them
        sizes = None if bias is None and aggregate == "mean" else Layout(w.shape for w in weights.values())
        part: dict[str, Any] = {"present": present, "worker_weights": federation.worker_weights}
        server = Aggregation(workers, bias, aggregate, sizes=sizes, world=world, measure=measure, **part)
        here = PresentTasks.of(present, batch, workers, world)
        try:
            mine, changes = world.workers(workers), exchange.changes
            tasks = _to_server(server, gradients, weights, batch, mine, first, here, federation, changes, plan)
        except NonFiniteError as error:
            if not check_finite:
                raise
            with torch.no_grad():
                own = gradients.losses(weights, batch)
            raise not_finite(gradients.plan(), weights, batch, own, first) from error
        right = _accuracies(accuracy, tasks, batch, here)
    losses, shares = _everyones(world, tasks.losses, right, batch.num_tasks, here)
    own = tasks.losses if here is None else here.spread(tasks.losses, batch.num_tasks, 0.0)
    loss = losses.mean()
    finite = math.isfinite(float(loss)) or all_finite(losses)  # a sum of finite losses may overflow
    if not finite:
        _refuse(gradients, weights, batch, own, losses, first, world, check_finite)
    total, report = server.finish()
    norm = report["grad_norm"]
    if not (norm is not None and math.isfinite(norm)) and finite and not all_finite(total):
        _refuse(gradients, weights, batch, own, losses, first, world, check_finite)
    gradient = unflatten(total, weights)
    if exchange.take is not None:
        exchange.take(gradient, server.operator)
    else:
        for name, parameter in weights.items():
            deliver(parameter, gradient[name], server.operator, add=True)
    if tasks.averages:
        gradients.plan().remember(*_averages(world, tasks, batch, here), total, losses)
    return Backward(loss, {"accuracy": mean_share(shares), **report, "sent_bytes": world.sent - sent})


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


def mean_share(shares: Sequence[Tensor]) -> float | None:
    """The mean over tasks with at least one label that counts; ``None`` without such a task."""
    mean = float(shares[0].mean()) if shares else math.nan
    if shares and math.isnan(mean):  # some tasks have no such label
        mean = float(shares[0].nanmean())
    return None if math.isnan(mean) else mean


def _spec(bias: Bias) -> str:
    operator = as_operator(bias)
    return "none" if operator is None else operator.spec


def _averages(world: World, tasks: OfTasks, batch: TaskBatch, here: PresentTasks | None) -> tuple[Tensor, list[Tensor]]:
    """The ids and the averages of a tracked estimator of all processes' tasks, of present workers."""
    assert batch.task_ids is not None
    ids, averages = batch.task_ids, tasks.averages
    if here is None:
        return world.gather(ids).flatten(), [world.gather(u).flatten(0, 1) for u in averages]
    spread = [here.spread(u, batch.num_tasks, 0.0) for u in averages]
    return world.gather(ids).flatten()[here.everyone], [world.gather(u).flatten(0, 1)[here.everyone] for u in spread]


def _accuracies(
    accuracy: Callable[[Tensor, Tree, Tensor | None], Tensor | None],
    tasks: OfTasks,
    batch: TaskBatch,
    here: PresentTasks | None,
) -> Tensor | None:
    """The accuracies of this process's tasks, of present workers."""
    if here is None:
        return accuracy(tasks.predictions, batch.query_y, batch.query_mask)
    if not len(here.positions):
        return None
    chosen = here.tasks(batch)
    return accuracy(tasks.predictions, chosen.query_y, chosen.query_mask)


def _everyones(
    world: World, losses: Tensor, right: Tensor | None, num_tasks: int, here: PresentTasks | None
) -> tuple[Tensor, Sequence[Tensor]]:
    """The losses ``[T]``, and the accuracies if there are any, of all processes' tasks, of present workers."""
    if here is None and world.size == 1:
        return losses, [] if right is None else [right.to(losses)]
    if here is None:
        outcomes = world.gather(torch.stack([losses] if right is None else [losses, right.to(losses)]))
        everyones, *shares = outcomes.transpose(0, 1).flatten(1)
        return everyones, shares
    # processes without present workers do not know whether there are accuracies
    own = losses.new_full((2, num_tasks), math.nan, dtype=torch.float64)
    own[0] = here.spread(losses.double(), num_tasks, math.nan)
    if right is not None:
        own[1] = here.spread(right.double(), num_tasks, math.nan)
    everyones, shares = world.gather(own).transpose(0, 1).flatten(1)[:, here.everyone]
    return everyones.to(losses.dtype), [shares]


def _to_server(
    server: Aggregation,
    gradients: MetaGradients,
    weights: Params,
    batch: TaskBatch,
    mine: range,
    first: int,
    here: PresentTasks | None,
    federation: Federation,
    changes: Callable[[Tensor], Tensor] | None,
    plan: Plan,
) -> OfTasks:
    """Send the gradients of this process's present workers to the server, and return the results of their tasks."""
    found, done, held = [], 0, []
    here_workers = None if here is None else here.workers
    if federation.local_steps == 1:
        computed = gradients.by_worker(weights, batch, len(mine), first, present=here_workers, plan=plan)
    else:
        steps, lr = federation.local_steps, federation.local_lr
        assert lr is not None
        computed = by_worker_locally(gradients, weights, batch, len(mine), first, here_workers, steps, lr)
    present = mine if here_workers is None else [mine[worker] for worker in here_workers]
    if not present:
        like = torch.cat([w.detach().reshape(-1) for w in weights.values()])
        server.add(like.new_zeros(0, len(like)), [])
        for _ in range(federation.local_steps):
            Step().seed()  # so that torch's generator is the same on all processes
        return no_tasks(weights, () if plan.memory is None else plan.problem.adapted)
    for rows, tasks in computed:
        found.append(tasks)
        if changes is not None:
            held.append(rows)
        else:
            _add(server, rows, present[done : done + len(rows)], batch, first)
        done += len(rows)
    if changes is not None:
        everyones = torch.cat(held)
        server.transport(changes(everyones), mine)
        _add(server, everyones, mine, batch, first)
    return OfTasks.joined(found)


def _add(server: Aggregation, rows: Tensor, workers: Sequence[int], batch: TaskBatch, first: int) -> None:
    try:
        server.add(rows, workers)
    except NonFiniteError:
        refuse_non_finite(batch, first)
        raise
