"""Predictions and losses as functions of a problem and the tasks' weights.

Legend: T tasks, N points of a task.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metamom.common.held import held, released
from metamom.common.trees import Tree, leaves, mapped
from metamom.compile.tracing import is_tracing
from metamom.maml.checks.hooks import (
    check_hooks,
    forward_hooks_of,
    forward_hooks_watched,
    has_global_forward_hooks,
    keeping_refused,
)
from metamom.maml.checks.loss_readings import LossFn
from metamom.maml.checks.loss_state import OwnState
from metamom.maml.checks.misfits import check_loss, targets_explained
from metamom.maml.estimators import ESTIMATORS
from metamom.maml.features import Features
from metamom.maml.padding import cut_off, loops_over_padded, takes_mask
from metamom.maml.problem import Problem, names_in_loss
from metamom.maml.running.plain_autograd import differentiable_twice, with_gradients_if_needed
from metamom.maml.running.run_by_task import RunByTask, Support
from metamom.maml.running.swapping import locked, slots, swapped
from metamom.maml.running.vectorize import map_over_tasks
from metamom.maml.task_weights import Params, Start
from metamom.maml.under_vmap.draws import rewinder
from metamom.maml.vmap_errors import VmapError, explained, loss_draws_refused


def predictions(
    problem: Problem,
    start: Start,
    own: Params,
    x: Tree,
    mask: Tensor | None = None,
    *,
    support: Support | None = None,
    draws: bool = True,
    features: Features | None = None,
    target: Callable[..., Any] | None = None,
) -> Tree:
    """Predict ``[T, N, ...]`` from ``x: [T, N, ...]`` with parameters that have moved from ``start`` to ``own``.

    Of points outside ``mask`` [T, N], predictions mean nothing; a loop over the tasks leaves them out. A random model
    draws separately for each task. With ``draws=False``, drawing is an error. With ``norm="support"``, normalisations
    use the statistics of ``support``, or of ``x`` if it is ``None``. ``features`` are those of earlier calls with the
    same weights outside ``own``. A ``target`` is called in place of the model, with its weights in it.
    """
    part, _ = problem.parts()

    def compute(x: Tree, loop: bool) -> Tree:
        return problem.run(
            problem.model,
            start,
            own,
            x,
            mask,
            draws=draws,
            dtype=problem.autocast,
            loop=loop,
            norm=problem.norm,
            support=support,
            features=features,
            target=target,
        )

    def run() -> Tree:
        padded = mask is not None or (support is not None and support.mask is not None)
        loop = problem.vectorization.loops(part)
        if not loop and not padded and target is None and problem.vectorization.vectorize == "auto":
            _refuse_silent_hooks(problem, start, own, x)
        if not loop and not padded and problem.vectorization.vectorize == "auto":
            first_order = ESTIMATORS[problem.estimator].derivatives == "none"
            loop = problem.run.prefers_a_loop(problem.model, own, x, first_order=first_order)
        if padded and not loop:
            must_not = problem.vectorization.vectorize == "vmap"
            kind = problem.norm, mask, must_not, problem.run.draws
            loop = loops_over_padded(problem.run.mixes, problem.model, partial(compute, loop=False), x, *kind)
        if loop or is_tracing() or problem.vectorization.vectorize != "auto":
            return compute(x, loop)
        if not (has_global_forward_hooks() or forward_hooks_of(problem.model)):
            return compute(x, loop)
        with locked(problem.model), keeping_refused(problem.model):
            return compute(x, loop)

    out = problem.vectorization.attempt([part], run)
    if problem.autocast is None:
        return out
    wanted = next(each.dtype for each in (*leaves(x), *own.values()) if each.is_floating_point())
    return mapped(lambda each: each.to(wanted) if each.is_floating_point() else each, out)


def _refuse_silent_hooks(problem: Problem, start: Start, own: Params, x: Tree) -> None:
    """Refuse vmap for a model with forward hooks that return nothing, and so run for their side effects.

    Such a hook records, prints or checks, and cannot use tensors from inside vmap. New hooks are tried on one task.

    Raises:
        VmapError: naming the modules.
    """
    model = problem.model
    hooks = frozenset() if is_tracing() else forward_hooks_of(model)
    if hooks <= problem.run.hooks:
        return
    first, rewind = partial(mapped, lambda w: w[:1]), rewinder()
    one = start._replace(own=first(start.own), kept=first(start.kept))
    run = partial(RunByTask(), draws=True, dtype=problem.autocast, loop=True, norm=problem.norm)
    with locked(model), forward_hooks_watched(model, everywhere=False) as silent, torch.no_grad():
        run(model, one, first(own), first(x))
    rewind()
    if silent:
        raise VmapError(
            f"forward hooks of {', '.join(sorted(silent))} return nothing, so they run for their side effects, and "
            'under vmap they would get tensors that cannot be used later. Use vectorize="loop".',
            where=f"a forward hook of {', '.join(sorted(silent))}",
            gist="it would get tensors that cannot be used later",
        )
    problem.run.hooks = hooks


def losses(problem: Problem, start: Start, own: Params, predicted: Tree, y: Tree, mask: Tensor | None = None) -> Tensor:
    """Compute the losses ``[T]`` of predictions ``[T, N, ...]``, given the parameters that made them.

    With a ``mask`` [T, N] of the points that count, the loss is called on each task's own points. A loss with a
    parameter ``mask`` is called on all tasks at once.

    If a loss module shares parameters with the model, it gets each task's adapted ones.

    Raises:
        ValueError: for targets that do not fit, or if the loss is not one number a task.
    """
    # torch's losses take bytes as labels, but not under vmap
    y = mapped(lambda each: each.long() if each.dtype == torch.uint8 else each, y)
    _, part = problem.parts()
    once, predicted = mask is None and problem.vectorization.loops(part), held(predicted)
    loss_fn, names = problem.readings.watched(problem.loss_fn, once), names_in_loss(problem.model, problem.loss_fn)

    masked = mask is not None and takes_mask(problem.loss_fn)

    def one_task(predicted: Tree, y: tuple[Tree, ...], mask: tuple[Tensor, ...], loop: bool) -> Tensor:
        if mask and loop:
            (predicted, y), mask = cut_off((predicted, y), mask[0]), (mask[0][mask[0]],)

        def value(predicted: Tree) -> Tensor:
            loss = loss_fn(released(predicted), *y, **({"mask": mask[0]} if masked else {}))
            check_loss(loss)
            return loss

        return _differentiable_in_predictions(value, predicted) if loop and not is_tracing() else value(predicted)

    module = problem.loss_fn if isinstance(problem.loss_fn, nn.Module) else None
    args = predicted, () if y is None else (y,), () if mask is None else (mask,)

    def run() -> Tensor:
        loop = problem.vectorization.loops(part)
        if mask is not None and not loop and not masked:
            if problem.vectorization.vectorize == "vmap":
                raise ValueError(
                    'loss_fn has no parameter mask, so with vectorize="vmap" it cannot leave out the padding of a '
                    'batch from metamom.pad. Use vectorize="auto", which calls it task by task on the original points.'
                )
            loop = True
        one = partial(one_task, loop=loop)
        if module is not None and (not loop or is_tracing()):
            check_hooks(module, compiling=loop)
        keeps_state = loop and module is not None and not is_tracing() and next(module.buffers(), None) is not None
        with (
            locked(module) if keeps_state and module is not None else nullcontext(),
            explained(problem.model, "loss_fn", loop=loop),
            targets_explained(released(predicted), y),
            differentiable_twice(module) if loop else nullcontext(),
            loss_draws_refused(leaves(predicted)[0].device) if loop and not is_tracing() else nullcontext(),
        ):
            state = OwnState(module) if keeps_state and module is not None else None
            each = one if state is None else partial(state.of_task, one)
            if module is not None and names:
                of_tasks = _with_parameters(module, each, names, start, own, args, loop)
            else:
                of_tasks = map_over_tasks(each, loop)(*args)
            if state is not None:
                state.finish()
            return of_tasks

    found = problem.vectorization.attempt([part], run)
    if found.dim() != 1:
        raise ValueError(
            f"loss_fn must return one number per task, as reduction='mean' does; got shape {tuple(found.shape[1:])} "
            "for each."
        )
    return found


def _differentiable_in_predictions(value: Callable[[Tree], Tensor], predicted: Tree) -> Tensor:
    """A loss that may differentiate with respect to predictions, as gradient penalties do, also without gradients."""
    found, form = pytree.tree_flatten(predicted)
    tensors = {str(i): x for i, x in enumerate(found)}
    names = [name for name, x in tensors.items() if x.is_floating_point() or x.is_complex()]
    loss: Tensor = with_gradients_if_needed(
        lambda given: value(pytree.tree_unflatten(list(given.values()), form)), tensors, names
    )
    return loss


def _with_parameters(
    module: nn.Module,
    loss: LossFn,
    names: Mapping[str, str],
    start: Start,
    own: Params,
    args: tuple[Tree, ...],
    loop: bool,
) -> Tensor:
    """Losses from a loss module with parameters; ``names`` maps its parameter names to those of the task weights."""
    with locked(module):
        found = slots(module)

        def one_task(own: Params, kept: Params, *args: Tree) -> Tensor:
            weights = {**start.shared, **kept, **own}
            with swapped(found, {name: weights[meta] for name, meta in names.items() if meta in weights}):
                return loss(*args)

        of_tasks: Tensor = map_over_tasks(one_task, loop)(own, start.kept, *args)
    return of_tasks
