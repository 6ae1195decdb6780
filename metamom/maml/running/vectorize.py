"""Whether a model and a loss run on all tasks at once, or task by task."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metamom.common.held import numbers_as_tensors
from metamom.common.user_code import users_level
from metamom.compile.tracing import is_tracing
from metamom.maml.checks.misfits import MisfitError
from metamom.maml.under_vmap.batched import over_tasks
from metamom.maml.under_vmap.draws import rewinder
from metamom.maml.vmap_errors import VmapError

Vectorize = Literal["auto", "vmap", "loop"]
VECTORIZE: tuple[Vectorize, ...] = ("auto", "vmap", "loop")
Part = tuple[Literal["model", "loss_fn"], bool]  # what runs, and whether in training mode
Result = TypeVar("Result")


class Vectorization:
    """Chooses between `torch.func.vmap` and a loop over the tasks, for the model and for the loss.

    With ``"auto"``, a part runs by vmap until vmap cannot batch it, and in a loop from then on.

    Args:
        vectorize: ``"auto"``, ``"vmap"`` or ``"loop"``.
    """

    def __init__(self, vectorize: Vectorize) -> None:
        self.vectorize = vectorize
        self.looped: set[Part] = set()
        self._vmapped: set[Part] = set()  # what has run by vmap before
        self._warned: set[str] = set()

    def loops(self, *parts: Part) -> bool:
        """Whether all these parts run in a loop."""
        return self.vectorize == "loop" or self.looped.issuperset(parts)

    def attempt(self, parts: Collection[Part], compute: Callable[[], Result]) -> Result:
        """Call ``compute``, which asks `loops` how to run each part. If vmap cannot batch it, loop and call it again.

        An error of vmap may look like one of data that does not fit. If the loop fails too, the data is to blame.

        Raises:
            ValueError: if vmap cannot batch it, with ``"vmap"``; if data does not fit.
            Exception: otherwise the loop's own error, if the loop fails too.
        """
        try:
            return self._attempt(parts, compute)
        except MisfitError as error:
            raise ValueError(str(error)) from error.__cause__

    def _attempt(self, parts: Collection[Part], compute: Callable[[], Result]) -> Result:
        if self.vectorize != "auto" or is_tracing() or self.loops(*parts):
            return compute()
        rewind = None if self._vmapped.issuperset(parts) else rewinder()  # which takes time
        try:
            found = compute()
            self._vmapped.update(parts)
            return found
        except (VmapError, MisfitError) as error:
            refusal: VmapError | MisfitError = error
        if rewind is not None:
            rewind()
        added = set(parts) - self.looped
        self.looped |= added
        try:
            found = compute()
        except BaseException as error:
            self.looped -= added
            if isinstance(refusal, MisfitError) and isinstance(error, ValueError):
                raise refusal from refusal.__cause__  # not the loop's error
            raise
        self._warn(refusal, {name for name, _ in added})
        return found

    def _warn(self, refusal: VmapError | MisfitError, names: set[str]) -> None:
        """Warn that these parts are slow, once for each."""
        if names <= self._warned:
            return
        self._warned |= names
        verb = "run" if len(names) > 1 else "runs"
        parts = " and ".join("the loss" if name == "loss_fn" else f"the {name}" for name in sorted(names, reverse=True))
        warnings.warn(
            f"{refusal.where or parts} cannot run on all tasks at once ({refusal.gist}), so {parts} {verb} task by "
            "task. The gradients are the same, and a step takes up to as many times as long as there are tasks. "
            'vectorize="loop" does so without this warning.',
            stacklevel=users_level(),
        )


def map_over_tasks(one_task: Callable[..., Any], loop: bool) -> Callable[..., Any]:
    """``one_task`` as a function of all tasks' arguments, by vmap or by `one_by_one`. It must not draw at random."""
    return partial(one_by_one, one_task) if loop else over_tasks(one_task)


def one_by_one(one_task: Callable[..., Any], *args: Any) -> Any:
    """Call ``one_task`` on each task's part of the arguments, and stack the results.

    Args:
        one_task: maps tensors, or structures of tensors, to a tensor or a structure of tensors.
        args: the same with a leading task axis.

    Raises:
        ValueError: if results of different tasks do not have the same structure and shapes.
    """
    of_tasks = [_of_each_task(arg) for arg in args]
    tasks = next(len(each) for each in of_tasks if each is not None)
    own = zip(*([arg] * tasks if each is None else each for arg, each in zip(args, of_tasks, strict=True)), strict=True)
    found = [one_task(*parts) for parts in own]
    if all(isinstance(x, Tensor) for x in found) and len({x.shape for x in found}) == 1:
        return _stack(tuple(found))
    results = [pytree.tree_flatten(x) for x in found]
    structures = {str(structure) for _, structure in results}
    if len(structures) > 1:
        results = [pytree.tree_flatten(numbers_as_tensors(x)) for x in found]
        structures = {str(structure) for _, structure in results}
    shapes = {tuple(tuple(leaf.shape) for leaf in leaves) for leaves, _ in results}
    if len(structures) > 1 or len(shapes) > 1:
        raise ValueError(
            "every task must give results of one shape, since they are stacked; got "
            f"{', '.join(str([list(shape) for shape in each]) for each in sorted(shapes))}. Give all tasks the same "
            "number of points, and keep all of them in the model."
        )
    stacked: list[Tensor] = [_stack(each) for each in zip(*(leaves for leaves, _ in results), strict=True)]
    return pytree.tree_unflatten(stacked, results[0][1])


def _of_each_task(tree: Any) -> Sequence[Any] | None:
    """The parts of a tree that belong to each task; ``None`` for a tree without tensors."""
    if isinstance(tree, Tensor):
        return _rows(tree)
    if not pytree.tree_leaves(tree):
        return None
    if type(tree) is dict and all(isinstance(x, Tensor) for x in tree.values()):  # quickly, for parameters
        return [dict(zip(tree, parts, strict=True)) for parts in zip(*map(_rows, tree.values()), strict=True)]
    leaves, form = pytree.tree_flatten(tree)
    return [pytree.tree_unflatten(list(parts), form) for parts in zip(*map(_rows, leaves), strict=True)]


def _rows(tensor: Tensor) -> Sequence[Tensor]:
    """Each task's part; a lone one is a view whose derivative is not a copy."""
    return (tensor.squeeze(0),) if tensor.shape[0] == 1 else tensor.unbind(0)


def _stack(parts: tuple[Tensor, ...]) -> Tensor:
    return parts[0].unsqueeze(0) if len(parts) == 1 else torch.stack(parts)
