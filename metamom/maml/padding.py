"""Tasks of different sizes in one batch: sets padded to one size, with masks of the points that count.

Legend: T tasks, N points of a task after padding, n before.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from functools import partial
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from metamom.batch import TaskBatch, check_points, kind_of
from metamom.common.numbers import counted
from metamom.common.trees import Tree, joined, leaves, mapped, named_leaves, shown
from metamom.common.user_code import users_level
from metamom.maml.normalisation.norm_modes import AnyNorm
from metamom.maml.running.swapping import is_training
from metamom.maml.under_vmap.draws import rewinder
from metamom.maml.vmap_errors import VmapError, gist

FIELDS = ("support_x", "support_y", "query_x", "query_y")


def pad(tasks: Sequence[TaskBatch | tuple[Tree, Tree, Tree, Tree]]) -> TaskBatch:
    """Make one batch of tasks with different numbers of shots or queries.

    Smaller sets are filled up with copies of their own points, which the masks leave out. A learner computes the
    losses, gradients and metrics of the original sets: see `metamom.MAML`.

    Args:
        tasks: batches, such as of one task each, or tuples ``(support_x [S, ...], support_y [S, ...],
            query_x [Q, ...], query_y [Q, ...])`` of one task. Fields may be trees, and targets ``None``.

    Returns:
        A `metamom.TaskBatch` with ``support_mask: [T, S]`` and ``query_mask: [T, Q]``, ``True`` for points that count;
        ``None`` where no set had to be filled up.

    Raises:
        TypeError: for anything else.
        ValueError: for no tasks, for an empty set, and for points of different shapes.

    Example:
        >>> one, two = ((torch.ones(shots, 1), torch.ones(shots, 1)) * 2 for shots in (1, 3))
        >>> pad([one, two]).support_mask
        tensor([[ True, False, False],
                [ True,  True,  True]])
    """
    parts = [part for number, task in enumerate(tasks) for part in _parts(number, task)]
    if not parts:
        raise ValueError("pad needs at least one task; got none.")
    sets = [_padded(name, [part[at] for part in parts], [part[at + 1] for part in parts]) for at, name in _PLACES]
    ids = [part.task_ids for part in parts]
    if any(each is None for each in ids) and any(each is not None for each in ids):
        raise ValueError("either all tasks have task_ids or none; got both.")
    task_ids = None if ids[0] is None else torch.cat([each for each in ids if each is not None])
    (support_x, support_y, support_mask), (query_x, query_y, query_mask) = sets
    return TaskBatch(support_x, support_y, query_x, query_y, task_ids, support_mask, query_mask)


_PLACES = ((0, "support"), (2, "query"))


def _parts(number: int, task: object) -> list[TaskBatch]:
    """Batches of one task each, without padding."""
    if isinstance(task, TaskBatch):
        for name, field in zip(FIELDS, task, strict=False):
            check_points(f"{name} of item {number}", field, absent=name.endswith("_y"))
        return [_cut_batch(task.part(t, t + 1)) for t in range(task.num_tasks)]
    if not (isinstance(task, (tuple, list)) and len(task) == 4):
        raise TypeError(
            "pad takes a list of tasks, each a TaskBatch or a tuple (support_x, support_y, query_x, query_y) of one "
            f"task; item {number} is {kind_of(task)}."
        )
    one = TaskBatch(*(mapped(lambda x: x.unsqueeze(0), field) for field in task))
    for name, field in zip(FIELDS, one, strict=False):
        check_points(f"{name} of task {number}, with a task axis in front,", field, absent=name.endswith("_y"))
    return [one]


def _cut_batch(one: TaskBatch) -> TaskBatch:
    fields: list[Tree] = []
    for at, mask in ((0, one.support_mask), (2, one.query_mask)):
        fields += one[at : at + 2] if mask is None else [mapped(lambda x: x[:, mask[0]], f) for f in one[at : at + 2]]  # noqa: B023
    return TaskBatch(*fields)._replace(task_ids=one.task_ids)


def _padded(name: str, xs: list[Tree], ys: list[Tree]) -> tuple[Tree, Tree, Tensor | None]:
    """The inputs and targets of one set of all tasks, and the mask of their points.

    Raises:
        ValueError: as `pad`.
    """
    sizes = [next((leaf.shape[1] for leaf in leaves(x) if leaf.dim() > 1), 1) for x in xs]
    most = max(sizes)
    if min(sizes) == 0:
        raise ValueError(f"a {name} set needs at least one point; task {sizes.index(0)} has none.")
    fields = []
    for field, trees in ((f"{name}_x", xs), (f"{name}_y", ys)):
        if any((tree is None) != (trees[0] is None) for tree in trees):
            raise ValueError(f"either all tasks have {field} or none; got both.")
        found = [list(named_leaves(field, () if tree is None else tree).items()) for tree in trees]
        for same in zip(*found, strict=True):
            held = [list(leaf.shape[1:2]) == [size] for (_, leaf), size in zip(same, sizes, strict=True)]
            if min(sizes) < most and not all(held) and any(list(leaf.shape[1:2]) == [most] for _, leaf in same):
                raise ValueError(
                    f"{same[0][0]} holds points in some tasks and something else in others: give what is one thing "
                    "for each task an axis of size 1 in front."
                )
        filled = [tree if size == most else _filled(tree, size, most) for tree, size in zip(trees, sizes, strict=True)]
        kinds = {shown(tree) for tree in filled}
        if len(kinds) > 1:
            raise ValueError(
                f"the points of all tasks must have one form, shape and dtype; {field} differs: "
                f"{', '.join(sorted(kinds))}. pad fills up sets, not the points in them."
            )
        fields.append(None if trees[0] is None else joined(torch.cat, filled))
    if min(sizes) == most:
        return fields[0], fields[1], None
    device = leaves(xs[0])[0].device
    return fields[0], fields[1], torch.arange(most, device=device) < torch.tensor(sizes, device=device).unsqueeze(1)


def _filled(tree: Tree, size: int, most: int) -> Tree:
    """Repeat a task's points, ``[1, n, ...]`` to ``[1, N, ...]``. Values that occur are values that the model takes."""

    def fill(x: Tensor) -> Tensor:
        if list(x.shape[1:2]) != [size]:
            return x
        return x[:, torch.arange(most, device=x.device) % size]

    return mapped(fill, tree)


def cut_off(tree: Tree, mask: Tensor) -> Tree:
    """Leave out the padding of one task, ``[N, ...]`` to ``[n, ...]``. Tensors of another length stay."""
    return mapped(lambda x: x[mask] if x.shape[:1] == mask.shape else x, tree)


def with_finite_padding(tree: Tree, mask: Tensor | None) -> Tree:
    """Inputs ``[T, N, ...]`` with zeros for a padding that is not finite: its gradient would be NaN and not zero."""
    if mask is None:
        return tree

    def filled(x: Tensor) -> Tensor:
        if x.shape[:2] != mask.shape or not x.is_floating_point() or bool(x[~mask].isfinite().all()):
            return x
        return x.masked_fill(~mask.view(*mask.shape, *[1] * (x.dim() - 2)), 0.0)

    return mapped(filled, tree)


def put_back(tree: Tree, mask: Tensor) -> Tree:
    """Undo `cut_off` for a model's outputs, with zeros for the padding."""
    places = mask.nonzero().flatten()

    def place(x: Tensor) -> Tensor:
        if x.shape[:1] != places.shape:
            return x
        return x.new_zeros(*mask.shape, *x.shape[1:]).index_copy(0, places, x)

    return mapped(place, tree)


def takes_mask(loss_fn: Callable[..., Any]) -> bool:
    """Whether a loss has a parameter ``mask``."""
    try:
        found = signature(loss_fn.forward if isinstance(loss_fn, nn.Module) else loss_fn).parameters.get("mask")
    except (TypeError, ValueError):
        return False
    return found is not None and found.kind in (Parameter.KEYWORD_ONLY, Parameter.POSITIONAL_OR_KEYWORD)


def loops_over_padded(
    known: dict[tuple[bool, AnyNorm | None], bool],
    model: nn.Module,
    predict: Callable[[Tree], Tree],
    x: Tree,
    norm: AnyNorm | None,
    mask: Tensor | None,
    must_not: bool,
    draws: AbstractSet[bool],
) -> bool:
    """Whether padded tasks must run one by one, since the padding would change the predictions for other points.

    Args:
        known: what was found before, by mode and by what normalisations use; updated.
        model: the model.
        predict: predictions for inputs, with the tasks' weights.
        x: ``[T, N, ...]``.
        norm: what its normalisations use.
        mask: the points of ``x`` that count; ``None`` if only a support set with statistics is padded.
        must_not: whether a loop is refused.
        draws: the modes in which the model was seen to draw at random; ``predict`` may add one.

    Raises:
        ValueError: if they must, and ``must_not``.
    """
    kind = is_training(model), norm
    if mask is not None and kind not in known:
        rewind = rewinder()

        def again(x: Tree) -> Tree:
            rewind()
            return predict(x)

        mixes = mixes_points(model, again, x, mask, frozen=norm == "frozen", draws=draws)
        rewind()
        if mixes is None:  # try with the next batch; until then a loop is right in any case
            return not must_not
        known[kind] = mixes
    mixed = True if mask is None else known[kind]
    if mixed and must_not:
        raise ValueError(
            f"{type(model).__name__} computes with all points of a set at once (batch normalisation, or attention "
            "to the set), so the padding of a batch from metamom.pad would change its predictions. Use "
            'vectorize="auto" or "loop", which run such tasks one by one without padding, or layers such as '
            "GroupNorm that take each point alone."
        )
    return mixed


def mixes_points(
    model: nn.Module, predict: Callable[[Tree], Tree], x: Tree, mask: Tensor, *, frozen: bool, draws: AbstractSet[bool]
) -> bool | None:
    """Whether predictions for points depend on the padding, as with the statistics of a batch or attention to a set.

    A model that does not draw at random is also run without the padding of all tasks, since it may read their number.

    Args:
        model: the model.
        predict: predictions ``[T, N, ...]`` for inputs; draws the same in every call.
        x: inputs ``[T, N, ...]``.
        mask: ``[T, N]``.
        frozen: whether batch normalisation uses running statistics.
        draws: the modes in which the model was seen to draw at random.

    Warns:
        if the model raises an error for fewer points, which then says nothing.

    Returns:
        ``None`` if there is no padding, or none that could have other values, to find out by.
    """
    if not frozen and any(isinstance(module, _BatchNorm) for module in model.modules()):
        return True
    changed = mapped(partial(_with_other_padding, mask=mask), x)
    if all(torch.equal(a, b) for a, b in zip(leaves(x), leaves(changed), strict=True)):
        return None
    with torch.no_grad():
        found = predict(x)
        if _differ(found, predict(changed), mask):
            return True
        few = int(mask.cumprod(1).sum(1).min())  # the points that all tasks begin with
        if is_training(model) in draws or not 0 < few < mask.shape[1]:
            return False
        try:
            of_few = predict(mapped(partial(_first, few=few, mask=mask), x))
        except VmapError:
            raise  # a loop over the tasks decides
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            why, fewer = gist(str(error.__cause__ or error)), counted(few, "point")
            warnings.warn(
                f"{type(model).__name__} does not take {fewer} of a task where it takes {mask.shape[1]} ({why}), so "
                "smaller tasks of this batch from metamom.pad keep their padding. "
                'vectorize="loop" calls the model on the original points instead, which raises this error.',
                stacklevel=users_level(),
            )
            return False
        return _differ(mapped(partial(_first, few=few, mask=mask), found), of_few, mask[:, :few])


def _differ(found: Tree, other: Tree, mask: Tensor) -> bool:
    """Whether two predictions ``[T, N, ...]`` differ in points of a mask ``[T, N]``."""
    for a, b in zip(leaves(found), leaves(other), strict=True):
        if a.shape != b.shape:
            return True
        if a.shape[:2] == mask.shape:
            a, b = a[mask], b[mask]
        scale = float(a.nan_to_num().abs().max()) if a.numel() else 0.0
        if not torch.allclose(a, b, rtol=1e-3, atol=1e-5 * scale, equal_nan=True):
            return True
    return False


def _first(x: Tensor, few: int, mask: Tensor) -> Tensor:
    """The first points of all tasks."""
    return x[:, :few] if x.shape[:2] == mask.shape else x


def _with_other_padding(x: Tensor, mask: Tensor) -> Tensor:
    """The same points with other values for the padding; whole numbers stay in the range of those that occur."""
    if x.shape[:2] != mask.shape:
        return x
    if x.is_floating_point() or x.is_complex():
        other = 1.5 * x.roll((1, 1), (0, 1)) + 0.5
    elif x.dtype == torch.bool:
        other = ~x
    else:
        other = torch.where(x == x.max(), x.min(), x.max())
    return torch.where(mask.view(*mask.shape, *[1] * (x.dim() - 2)), x, other)
