"""Split the bias of a meta-gradient into its sources, task by task, by comparing estimators on the same points.

Legend: T tasks, S points of a task's pool, h points of one half (the inner batches of one adaptation), K pairs of
halves A and B that a pool is cut into, d meta-parameters, m inner batch in shots.

All estimators use the same pairs and the same query points, so that common noise cancels in their differences. If the
reference comes from the same pool, noise that is linear in its points cancels too. Each estimator with two halves is
averaged over both orders, (A, B) and (B, A).
"""

from __future__ import annotations

import torch
from torch import Tensor

from metamom.batch import TaskBatch
from metamom.bias import Layout
from metamom.maml.estimators import ESTIMATORS, Estimator, support_parts, treats_halves_alike
from metamom.maml.learner import MAML
from metamom.server.aggregate import flatten

Parts = dict[str, Tensor]


def points_per_shot(batch: TaskBatch) -> int:
    """1 for regression; the number of classes of a task for classification, with sets ordered shot by shot."""
    if not all(isinstance(x, Tensor) for x in batch[:4]) or batch[5:] != (None, None):
        raise TypeError(
            "the bias is measured on batches whose fields are single tensors; this sampler's are trees, have "
            "no targets, or are padded. Measure it on a model and a sampler with one input tensor."
        )
    labels = batch.support_y
    if labels.dim() > 2 or labels.is_floating_point():
        return 1
    return len(set(labels[0].tolist()))


def half_points(learner: MAML, inner_batch: int, batch: TaskBatch) -> int:
    """h, the number of points in the inner batches of one adaptation, ``inner_batch`` shots each."""
    return inner_batch * points_per_shot(batch) * support_parts("exact", learner.inner_steps, learner.inner_batches)


def pairs(pool: TaskBatch, half: int, most: int | None = None) -> tuple[TaskBatch, int]:
    """Cut the pools into pairs of halves, each pair a separate task ``[T·K, 2h, ...]``; also return K <= ``most``.

    Raises:
        ValueError: if a pool does not hold a pair.
    """
    points = pool.support_x.shape[1]
    count = points // (2 * half)
    if not count:
        raise ValueError(
            f"two inner batches of {half} points do not fit in a pool of {points} support points: use a sampler with "
            "more shots, or smaller inner batches."
        )
    count = count if most is None else min(count, most)
    x, y = (_cut(x[:, : count * 2 * half], 2 * half) for x in pool[:2])
    return TaskBatch(x, y, *_repeated(pool, count)), count


def task_gradients(learner: MAML, batch: TaskBatch, tasks: int) -> Tensor:
    """Meta-gradients ``[T, d]`` of T·K tasks, averaged over each K, in float64."""
    return flatten(learner.meta_gradient(batch, workers=tasks).grads.values()).double()


def reference(learner: MAML, pool: TaskBatch) -> tuple[Tensor, Tensor]:
    """The gradient of f on large inner batches for each task, ``[T, d]``, and its bias correction.

    ``2 c(S/2) - c(S/4)``, with c(h) the cross-fit estimator on halves of h points. It does not have a coupling bias,
    and a bias that falls as 1/h is extrapolated away. If the bias falls as 1/√h (kinks of ReLUs), 1.4 times the
    correction ``c(S/2) - c(S/4)`` remains.

    For an estimator with another meta-objective, c is its record's ``reference``, averaged over both halves.

    Raises:
        ValueError: for a pool of fewer than four shots.
    """
    cross = learner.like(estimator=ESTIMATORS[learner.estimator].reference, inner_batches="same")
    shot = points_per_shot(pool)
    quarter = pool.support_x.shape[1] // (4 * shot) * shot
    if not quarter:
        raise ValueError(
            f"the reference splits a pool into quarters of at least one shot; got {pool.support_x.shape[1]} support "
            f"points, {shot} per shot. Use a sampler with more shots."
        )
    T = pool.num_tasks
    whole = pool._replace(support_x=pool.support_x[:, : 4 * quarter], support_y=pool.support_y[:, : 4 * quarter])
    large = _over_halves(cross, whole, 1, T)
    order = [0, 2, 1, 3]  # pair the quarters A1 with B1, A2 with B2, so that both sizes use the same halves
    x, y = (_taken(x, order, quarter) for x in whole[:2])
    small, count = pairs(TaskBatch(x, y, pool.query_x, pool.query_y), quarter)
    correction = large - _over_halves(cross, small, count, T)
    return large + correction, correction


def population_gradients(learner: MAML, population: TaskBatch) -> Tensor:
    """The gradient of f for each task, ``[T, d]``, with the population as support set."""
    exact = learner.like(estimator=ESTIMATORS[learner.estimator].population, inner_batches="same")
    return task_gradients(exact, population, population.num_tasks)


def estimator_parts(learner: MAML, pool: TaskBatch, inner_batch: int, target: Tensor, most: int | None = None) -> Parts:
    """Split the difference between the estimator's mean and the reference by source. The parts add up to it.

    ``curvature``: a mini-batch inside a non-linear gradient, cross-fit − reference. ``coupling``: the same inner batch
    in the adapted weights and in the Hessian, exact − cross-fit. ``hessian``: no Hessian (first-order − exact), or
    differences instead of it (hessian-free − cross-fit). ``extrapolation``: richardson − exact. ``estimator``: the
    rest, for an estimator that does not declare its sources. For those with a proximal problem, ``curvature`` is
    implicit − reference, a mini-batch inside the solution and its derivatives, and ``perturbation`` is
    perturbed − implicit.

    Args:
        learner: the learner with the estimator.
        pool: T tasks of S points.
        inner_batch: m.
        target: the reference ``[T, d]``.
        most: the most pairs to cut out of a pool.

    Returns:
        For each source that the estimator has, ``[T, d]``.

    Raises:
        ValueError: if the pool does not hold two inner batches.

    Reference:
        docs/theory/maml.md, "MAML's gradients".
    """
    batch, count = pairs(pool, half_points(learner, inner_batch, pool), most)
    T = pool.num_tasks

    record = ESTIMATORS[learner.estimator]

    def on_its_points(name: Estimator) -> Tensor:
        return _over_halves(learner.like(estimator=name), batch, count, T)

    before = on_its_points(record.reference)
    parts = {"curvature": before - target}
    for source in record.sources:
        after = on_its_points("exact" if source == "coupling" else learner.estimator)
        parts[source] = after - before
        before = after
    return parts


def single_gradients(
    learner: MAML, pool: TaskBatch, inner_batch: int, queries: int | None, each: int
) -> tuple[Tensor, Layout]:
    """Gradients ``[T/each, d]`` of workers with ``each`` tasks, from one draw of the inner batches; and tensor sizes.

    Args:
        learner: the learner with the estimator.
        pool: T tasks; their first points are used.
        inner_batch: m.
        queries: shots of the query set to use; all if ``None``.
        each: tasks of a worker.
    """
    points = inner_batch * points_per_shot(pool) * learner.support_parts
    asked = pool.query_x.shape[1] if queries is None else queries * points_per_shot(pool)
    support_x, support_y, query_x, query_y = pool[:4]
    batch = TaskBatch(support_x[:, :points], support_y[:, :points], query_x[:, :asked], query_y[:, :asked])
    weights = learner.meta_parameters().values()
    own = learner.like()
    grads = flatten(own.meta_gradient(batch, workers=pool.num_tasks // each).grads.values())
    return grads, Layout(w.shape for w in weights)


def _repeated(pool: TaskBatch, count: int) -> tuple[Tensor, Tensor]:
    return pool.query_x.repeat_interleave(count, 0), pool.query_y.repeat_interleave(count, 0)


def _over_halves(learner: MAML, batch: TaskBatch, count: int, tasks: int) -> Tensor:
    """The estimator's mean ``[T, d]`` over the halves of K pairs a task, or over both orders of them."""
    name = learner.estimator
    if support_parts(name, 1) == 1:
        return task_gradients(learner, _halves(batch), tasks)
    both = batch if treats_halves_alike(name) else _joined(batch, _swapped(batch), count)
    return task_gradients(learner, both, tasks)


def _halves(batch: TaskBatch) -> TaskBatch:
    """Turn each half into a separate task, ``[2 T·K, h, ...]``, with the halves of a pair adjacent."""
    x, y = (_cut(x, x.shape[1] // 2) for x in batch[:2])
    return TaskBatch(x, y, *_repeated(batch, 2))


def _swapped(batch: TaskBatch) -> TaskBatch:
    x, y = (_taken(x, [1, 0], x.shape[1] // 2) for x in batch[:2])
    return TaskBatch(x, y, batch.query_x, batch.query_y)


def _joined(first: TaskBatch, second: TaskBatch, count: int) -> TaskBatch:
    """Join two batches of ``[T·K]`` into one of ``[T·2K]``, task by task."""

    def each(a: Tensor, b: Tensor) -> Tensor:
        a, b = (x.reshape(-1, count, *x.shape[1:]) for x in (a, b))
        return torch.cat([a, b], 1).flatten(0, 1)

    x, y, query_x, query_y = (each(a, b) for a, b in zip(first[:4], second[:4], strict=True))
    return TaskBatch(x, y, query_x, query_y)


def _cut(x: Tensor, size: int) -> Tensor:
    """Cut sets ``[T, S, ...]`` into tasks of ``size`` points, ``[T·S/size, size, ...]``."""
    return x.reshape(-1, size, *x.shape[2:])


def _taken(x: Tensor, order: list[int], size: int) -> Tensor:
    """Reorder the parts of ``size`` points in each set."""
    return torch.cat([x[:, part * size : (part + 1) * size] for part in order], 1)
