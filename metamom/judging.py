"""The values of a learner on a block of tasks, for `metamom.evaluate`.

Legend: T tasks, Q query points a task, L learners.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from metamom.batch import TaskBatch
from metamom.bias.checks import all_finite
from metamom.common.held import held, released
from metamom.common.kinds import named_type
from metamom.common.numbers import counted
from metamom.common.trees import Tree, leaves, lone, mapped
from metamom.maml.checks.batch_checks import refuse_non_finite
from metamom.maml.features import shared_between_predictions
from metamom.maml.learner import MAML
from metamom.maml.metrics import accuracy
from metamom.maml.padding import cut_off
from metamom.maml.task_weights import Params
from metamom.task_metrics import Metric, of_tasks

Judged = tuple[int, Tensor, bool]  # steps, values [T] or [L, T], whether they are accuracies


def judged(
    learners: Sequence[MAML], batch: TaskBatch, steps: Collection[int], first: int, metric: str | Metric | None
) -> Iterator[Judged]:
    """Values ``[L, T]`` of T tasks after each number of steps. The first of them has the number ``first``.

    The learners adapt alike, so the first one does, and differ in what their normalisations use for queries.
    """
    adapting = learners[0]
    with shared_between_predictions(batch.support_x, batch.query_x):
        adapted = adapting.trajectory(batch.support_x, batch.support_y, steps=max(steps), mask=batch.support_mask)
        for step, params in enumerate(adapted):
            if step in steps:
                found = [_of_weights(learner, params, batch, first, metric) for learner in learners]
                yield step, torch.stack([values for values, _ in found]), found[0][1]


def tasks_at_once(learner: MAML, batch: TaskBatch, steps: int) -> int | None:
    """How many tasks of a batch to adapt and judge at a time; all for ``None``.

    It is the learner's ``chunk_size``. ``"auto"`` is measured on predictions, of which at most half is alive at a time
    without a graph, and on an inner step if there are any. If that fails, it is all: judging them says what is wrong.
    """

    def trajectory(one: TaskBatch, steps: int) -> list[Params]:
        return list(learner.trajectory(one.support_x, one.support_y, steps=steps, mask=one.support_mask))

    def predict(one: TaskBatch) -> None:
        [start] = trajectory(one, 0)
        with torch.enable_grad():
            _predicted(learner, {name: w.detach().requires_grad_() for name, w in start.items()}, one)

    plan = learner._plan()
    try:
        found = learner._gradients.chunk_size(plan, batch, predict, "predictions")
        if found is None or steps == 0:
            return found and 2 * found
        of_support = learner._gradients.chunk_size(plan, batch, partial(trajectory, steps=1), "adaptation")
    except Warning:  # one that the caller has turned into an error
        raise
    except Exception:  # noqa: BLE001  # of the caller's model and data: the tasks themselves raise it again
        return None
    return of_support and min(of_support, 2 * found)


def _predicted(learner: MAML, params: Params, batch: TaskBatch) -> Tree:
    """The predictions of queries at adapted weights. Distributions need not be one over all tasks here."""
    support = {}
    if learner.norm == "support":
        support = {"support_x": batch.support_x, "support_mask": batch.support_mask}
    predict = learner.predicted if type(learner).predict is MAML.predict else learner.predict
    return held(predict(params, batch.query_x, batch.query_mask, **support))


@torch.no_grad()
def _of_weights(
    learner: MAML, params: Params, batch: TaskBatch, first: int, metric: str | Metric | None
) -> tuple[Tensor, bool]:
    """The values at adapted weights, and whether they are accuracies; see `MAML.judge`."""
    predictions = _predicted(learner, params, batch)
    if metric is not None and metric not in ("accuracy", "loss"):
        return _measured(metric, predictions, batch, first), False
    losses, right = learner.judge(params, predictions, batch.query_y, batch.query_mask)
    return _chosen(losses, right, predictions, batch, first, metric)


def _chosen(
    losses: Tensor, right: Tensor | None, predictions: Tree, batch: TaskBatch, first: int, metric: str | Metric | None
) -> tuple[Tensor, bool]:
    """The losses ``[T]`` or the accuracies ``[T]`` of predictions, and whether they are accuracies."""
    if not (all_finite(losses) and (right is None or all(map(all_finite, leaves(predictions))))):
        refuse_non_finite(batch, first)
    if metric == "accuracy" and right is None:
        raise _no_accuracy(predictions, batch.query_y)
    return (losses, False) if right is None or metric == "loss" else (right, True)


@torch.no_grad()
def judged_by_protocol(
    learner: Any,
    batch: TaskBatch,
    steps: Collection[int],
    first: int,
    metric: str | Metric | None,
    judge: Callable[[Any, Tree, Tree], tuple[Tensor, Tensor | None]] | None = None,
) -> Iterator[Judged]:
    """The same for any `metamom.evaluation.Adaptable`, which adapts from the start for each number of steps.

    ``judge`` computes losses and accuracies from what ``adapt`` returned, predictions and targets. Without it, shapes
    decide whether predictions are class scores.
    """
    parts = _without_padding(batch)
    for step in sorted(steps):
        each = []
        is_accuracy = False
        for number, part in enumerate(parts):
            state = learner.adapt(part.support_x, part.support_y, steps=step)
            predictions = mapped(Tensor.detach, _predictions(learner, state, part))
            if judge is not None and metric in (None, "accuracy", "loss"):
                losses, right = judge(state, predictions, part.query_y)
                values, is_accuracy = _chosen(losses, right, predictions, part, first + number, metric)
            else:
                values, is_accuracy = _of_predictions(learner, predictions, part, first + number, metric)
            each.append(values)
        yield step, torch.cat(each), is_accuracy


def _predictions(learner: Any, state: Any, batch: TaskBatch) -> Tree:
    """Predictions ``[T, Q, ...]`` of any learner.

    Raises:
        TypeError: for anything but tensors.
        ValueError: for predictions of other tasks or points.
    """
    found = held(learner.predict(state, batch.query_x))
    kind = type(learner).__name__
    if not leaves(found) or not all(isinstance(each, Tensor) for each in leaves(found)):
        raise TypeError(
            f"{kind}.predict must return predictions, a tensor [T, Q, ...]; got {named_type(released(found))}."
        )
    for each in leaves(found):
        if each.dim() < 2 or each.shape[0] != batch.num_tasks:
            raise ValueError(
                f"{kind}.predict must return predictions [T, Q, ...] for the queries of "
                f"{counted(batch.num_tasks, 'task')}; got {list(each.shape)}."
            )
    return found


def _of_predictions(
    learner: Any, predictions: Tree, batch: TaskBatch, first: int, metric: str | Metric | None
) -> tuple[Tensor, bool]:
    """The values of predictions, and whether they are accuracies."""
    if metric is not None and metric not in ("accuracy", "loss"):
        return _measured(metric, predictions, batch, first), False
    scores, labels = lone(predictions), lone(batch.query_y)
    right = accuracy(scores, labels) if scores is not None and labels is not None and metric != "loss" else None
    if right is not None:
        if not all_finite(predictions):
            refuse_non_finite(batch, first)
        return right, True
    if metric == "accuracy":
        raise _no_accuracy(predictions, batch.query_y)
    loss_fn = getattr(learner, "loss_fn", None)
    if not callable(loss_fn):
        raise TypeError(
            f"{type(learner).__name__} has no loss_fn to measure a loss with, and its predictions are not class "
            'scores: choose a metric, such as metric="rmse", or a function (predictions, targets) -> number.'
        )
    return _measured(loss_fn, predictions, batch, first), False


def _measured(metric: str | Metric, predictions: Tree, batch: TaskBatch, first: int) -> Tensor:
    if not all(map(all_finite, leaves(predictions))):
        refuse_non_finite(batch, first)
    return of_tasks(metric, predictions, batch.query_y, batch.query_mask)


def _no_accuracy(predictions: Tree, targets: Tree) -> ValueError:
    shapes = [[list(each.shape) for each in leaves(tree)] for tree in (predictions, targets)]
    return ValueError(
        f"accuracy compares class scores with class indices, and these are not: predictions {shapes[0]}, targets "
        f'{shapes[1]}. Choose another metric, such as metric="loss" or "rmse".'
    )


def _without_padding(batch: TaskBatch) -> list[TaskBatch]:
    """A batch as it is, or each of its tasks as a batch of its own points if they are padded."""
    if batch.support_mask is None and batch.query_mask is None:
        return [batch]
    parts = []
    for t in range(batch.num_tasks):
        one = [mapped(lambda x: x[t], field) for field in batch[:4]]  # noqa: B023
        for mask, places in ((batch.support_mask, (0, 1)), (batch.query_mask, (2, 3))):
            for place in places if mask is not None else ():
                one[place] = cut_off(one[place], mask[t])  # type: ignore[index]
        parts.append(TaskBatch(*(mapped(lambda x: x.unsqueeze(0), field) for field in one)))
    return parts
