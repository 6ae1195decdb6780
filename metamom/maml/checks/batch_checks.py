"""Checks of a batch before it is used: its type, and whether its shapes fit together.

Only types and shapes are checked up front, which is cheap. Values are checked after a failure (`refuse_non_finite`
here, `metamom.maml.checks.misfits`).

Legend: T tasks, S support points a task, Q query points a task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from metamom.batch import TaskBatch, check_ids, check_points, kind_of
from metamom.common.numbers import counted
from metamom.common.trees import Tree, count, lone, named_leaves, points

IGNORED = -100  # the default ignore_index of torch's classification losses


class NonFiniteDataError(ValueError):
    """The result is not finite because the batch contains NaN, infinities, or a task without any label that counts."""


def check_batch(batch: object) -> None:
    """Refuse anything that is not a batch of tasks.

    Raises:
        TypeError: for anything but a `TaskBatch` of tensors.
        ValueError: for tensors that disagree on the number of tasks or points, or are empty.
    """
    if not isinstance(batch, TaskBatch):
        advice = " Convert it: TaskBatch(*batch)." if isinstance(batch, (tuple, list)) and _like_fields(batch) else ""
        if (
            isinstance(batch, (tuple, list))
            and not advice
            and batch
            and all(isinstance(each, (tuple, list)) for each in batch)
        ):
            advice = " Make one batch of a list of tasks, of one size or of several: metamom.pad(tasks)."
        raise TypeError(
            f"wanted a metamom.TaskBatch(support_x, support_y, query_x, query_y); got {kind_of(batch)}.{advice}"
        )
    check_set("support", batch.support_x, batch.support_y)
    check_set("query", batch.query_x, batch.query_y)
    ids = batch.task_ids
    check_ids("task_ids", ids)
    tasks = [count(batch.support_x), count(batch.query_x)]
    if len({*tasks, *([] if ids is None else [len(ids)])}) > 1:
        also = "" if ids is None else f", task_ids {len(ids)}"
        raise ValueError(
            f"all tensors of a batch must hold the same tasks [T, ...]; got support sets of "
            f"{counted(tasks[0], 'task')}, query sets of {tasks[1]}{also}."
        )
    if tasks[0] == 0:
        raise ValueError("a batch needs at least one task; got tensors [0, ...].")
    check_mask("support", batch.support_x, batch.support_mask)
    check_mask("query", batch.query_x, batch.query_mask)


def _like_fields(batch: Sequence[object]) -> bool:
    """Whether these may be the fields of one batch."""
    return (
        len(batch) in (4, 5, 7)
        and not any(isinstance(each, TaskBatch) for each in batch)
        and (not all(isinstance(each, (tuple, list)) and len(each) == 4 for each in batch))
    )


def check_mask(name: str, x: Tree, mask: object) -> None:
    """Refuse anything but a mask of the points of a set, or ``None``.

    Raises:
        TypeError: for anything but booleans.
        ValueError: for another shape, or a task of which no point counts.
    """
    if mask is None:
        return
    wanted = (count(x), points(x))
    if not (isinstance(mask, Tensor) and mask.dtype == torch.bool):
        raise TypeError(
            f"{name}_mask must be a tensor of booleans {list(wanted)}, as metamom.pad makes it; got {kind_of(mask)}."
        )
    if tuple(mask.shape) != wanted:
        raise ValueError(
            f"{name}_mask must have the shape {list(wanted)} of the points in {name}_x; got {list(mask.shape)}."
        )
    if not bool(mask.any(1).all()):
        raise ValueError(f"{name}_mask leaves task {int((~mask.any(1)).nonzero()[0])} without any point.")


def check_set(name: str, x: object, y: object, *, empty: bool = False) -> None:
    """Refuse anything that is not a support or query set.

    Args:
        name: ``"support"`` or ``"query"``.
        x: inputs ``[T, N, ...]``, a tensor or a tree.
        y: targets ``[T, N, ...]``, a tensor or a tree, or ``None``.
        empty: whether N may be 0.

    Raises:
        TypeError: for anything but tensors.
        ValueError: for tensors of different T or N, or N = 0.
    """
    check_points(f"{name}_x", x)
    check_points(f"{name}_y", y, absent=True)
    if not (isinstance(x, Tensor) and isinstance(y, Tensor)):
        _check_trees(name, x, y, empty=empty)
        return
    if x.shape[:2] != y.shape[:2]:
        raise ValueError(
            f"{name}_x and {name}_y must hold the same points of the same tasks, [T, {name[0].upper()}, ...]; got "
            f"{list(x.shape)} and {list(y.shape)}."
        )
    if x.shape[1] == 0 and not empty:
        raise ValueError(
            f"a {name} set needs at least one point per task, since the loss is a mean over its points; got {name}_x "
            f"{list(x.shape)}."
        )


def _check_trees(name: str, x: Tree, y: Tree, *, empty: bool) -> None:
    """`check_set` for trees of tensors. Which of them hold points, and which one thing a task, only the model knows."""
    if y is not None and count(x) != count(y):
        raise ValueError(
            f"{name}_x and {name}_y must hold the same tasks, [T, ...]; got {count(x)} and {counted(count(y), 'task')}."
        )
    none = [place for place, leaf in named_leaves(f"{name}_x", x).items() if 0 in leaf.shape[1:2]]
    if none and not empty:
        raise ValueError(
            f"a {name} set needs at least one point per task, since the loss is a mean over its points; got none in "
            f"{', '.join(none)}."
        )


def check_adapted(params: object, x: object, model: Mapping[str, Tensor]) -> None:
    """Refuse anything that is not adapted weights, or weights that do not match the tasks of these inputs.

    Args:
        params: ``{name: [T, *shape]}``.
        x: ``[T, N, ...]``.
        model: the model's own parameters by name, ``[*shape]``.

    Raises:
        TypeError: for anything else.
        ValueError: for unknown names, or shapes that do not fit.
    """
    check_points("x", x)
    if not isinstance(params, Mapping):
        raise TypeError(f"predict takes adapted weights by name, as adapt returns them; got {kind_of(params)}.")
    unknown = [name for name in params if name not in model]
    if unknown:
        raise ValueError(f"the model has no parameters {unknown}; it has {', '.join(model)}.")
    for name, w in params.items():
        if not isinstance(w, Tensor):
            raise TypeError(f"the adapted {name} must be a tensor; got {kind_of(w)}.")
        wanted = (count(x), *model[name].shape)
        if tuple(w.shape) != wanted:
            raise ValueError(
                f"inputs of {counted(count(x), 'task')} need the tasks' weights, adapted to each, [T, *shape] as adapt "
                f"returns them: {list(wanted)} for {name}; got {list(w.shape)}."
            )


def refuse_non_finite(batch: TaskBatch, first: int = 0) -> None:
    """Raise an error if the data is not finite. Call this after a result is not finite.

    Args:
        batch: T tasks.
        first: the index of its first task in a larger batch.

    Raises:
        NonFiniteDataError: naming the field, how many values, and the first task; also if no label of a task counts.
    """
    said = []
    masks = {"support_x": batch.support_mask, "query_x": batch.query_mask}  # a loss with a mask may read all targets
    fields = (named_leaves(name, x) for name, x in zip(batch._fields[:4], batch[:4], strict=True) if x is not None)
    for name, x in (place for field in fields for place in field.items()):
        if not x.is_floating_point():
            continue
        bad = ~torch.isfinite(x)
        mask = masks.get(name.partition("[")[0])
        if mask is not None and x.shape[:2] == mask.shape:
            bad &= mask.view(*mask.shape, *[1] * (x.dim() - 2))
        count = int(bad.sum())
        if count:
            task = int(bad.reshape(len(bad), -1).any(1).nonzero()[0])
            said.append(f"{name} holds {count} of {bad.numel()}, first in task {first + task}")
    if said:
        raise NonFiniteDataError(
            f"the result is not finite, and neither is the data. NaN or infinite values: {'; '.join(said)}. Clean "
            "the data, or mask those points in the loss."
        )
    for name, y in (("query_y", lone(batch.query_y)), ("support_y", lone(batch.support_y))):
        if y is not None and y.dtype == torch.int64 and y.dim() > 1:
            nothing = (y == IGNORED).flatten(1).all(1).nonzero().flatten()
            if len(nothing):
                raise NonFiniteDataError(
                    f"the result is not finite: all labels of {name} are {IGNORED} in {len(nothing)} of {len(y)} "
                    f"tasks, first in task {first + int(nothing[0])}. Torch's losses ignore such labels, which "
                    "leaves nothing to average. Give each task at least one other label."
                )
