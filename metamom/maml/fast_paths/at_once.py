"""The meta-gradient of a chunk of tasks by vmap, once model and loss are known; see `metamom.maml.fast_paths.settled`.

Legend: T tasks, n workers with T/n tasks each, J inner steps, N points of a task.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from metamom.common.modules import named_buffers_of, named_parameters_of
from metamom.common.trees import count
from metamom.maml.checks.hooks import check_hooks, forward_hooks_of, has_global_forward_hooks
from metamom.maml.estimators import ESTIMATORS, Adaptations, InnerBatch
from metamom.maml.fast_paths.settled import (
    Computed,
    Draws,
    FastPath,
    Unconnected,
    UnsuitableError,
    after_step,
    as_settled,
    is_settled,
    labels,
    sets_of,
)
from metamom.maml.heads import Kind, options_of
from metamom.maml.inner_step import gradients, inner_step
from metamom.maml.inner_updates import Moments
from metamom.maml.problem import Problem
from metamom.maml.running.swapping import first_tensors_left, in_mode, is_training, locked, slots, swapped
from metamom.maml.task_weights import Params, Start, deal
from metamom.maml.under_vmap.batched import of_lone_task, over_tasks
from metamom.maml.vmap_errors import restored
from metamom.nets.low_rank import plain


def runs_at_once(problem: Problem, term: Adaptations) -> bool:
    """Whether the model and the loss run by vmap, and the model has done so before."""
    run, model, loss = problem.run, problem.model, problem.loss_fn
    if any(problem.vectorization.loops(part) for part in problem.parts()):
        return False
    hooked = has_global_forward_hooks() or not forward_hooks_of(model) <= run.hooks
    if problem.vectorization.vectorize == "auto" and hooked:
        return False
    if not is_settled(run, model, problem.norm, count(term.query_x), loop=False):
        return False
    if isinstance(loss, nn.Module) and (named_buffers_of(loss) or named_parameters_of(loss)):
        return False
    if _shares_features(problem, term):
        return False
    if problem.vectorization.vectorize != "auto":
        return True
    first_order, adapted = ESTIMATORS[problem.estimator].derivatives == "none", dict.fromkeys(problem.adapted)
    return not any(run.prefers_a_loop(model, adapted, x, first_order=first_order) for x, _ in sets_of(term))


def _shares_features(problem: Problem, term: Adaptations) -> bool:
    """Whether inner steps may share features, which are then computed once (`metamom.maml.features`)."""
    model, heads, adapted = problem.model, problem.run.heads, problem.adapted
    sets = {id(step.x): step.x for step in term.steps}
    if len(sets) == len(term.steps) or not heads.may_have_one(model, adapted):
        return False
    options, mode = options_of(model), is_training(model)
    kinds = [Kind(mode, problem.norm, adapted, ((x.shape[1:], x.dtype),)) for x in sets.values()]
    return options is not None and not all(heads.has_none(kind, options) for kind in kinds)


def at_once(problem: Problem, weights: Params, term: Adaptations, workers: int, scale: float) -> Computed:
    """Query losses, predictions, and each worker's gradient of ``scale`` times the sum of losses.

    Args:
        problem: the model and loss, for which `runs_at_once` holds.
        weights: the meta-parameters by name, which are the model's.
        term: T adaptations.
        workers: n.
        scale: a number.

    Raises:
        UnsuitableError: for a model or a loss that needs more care.
        ValueError: as `metamom.MAML.meta_gradient`.
    """
    tasks, model, adapted = count(term.query_x), problem.model, problem.adapted
    keep_graph = ESTIMATORS[problem.estimator].derivatives != "none"
    rows = {name: w.detach().expand(workers, *w.shape).requires_grad_() for name, w in weights.items()}
    start = deal(rows, tasks, adapted, ())
    if isinstance(problem.loss_fn, nn.Module):
        check_hooks(problem.loss_fn)
    check_hooks(model)
    inputs = [x for x, _ in sets_of(term)]
    with locked(model) as modules, in_mode(model), restored(inputs), first_tensors_left(modules) as left:
        calls = _Calls(problem, start, term)
        own, moments = start.own, dict[str, Moments | None]()
        for number, step in enumerate(term.steps):
            value, _ = calls.judged(number, own)
            adapting = [own[name] for name in adapted]
            grads = dict(zip(adapted, gradients(value.sum(), adapting, create_graph=keep_graph), strict=True))
            seen = Unconnected(problem, adapted, derivable=keep_graph)
            seen.see(grads)
            seen.check(adapted, step)
            own = after_step(problem, own, grads, moments, inner_step)
        value, predicted = calls.judged(len(term.steps), own)
        new = gradients(value.sum() * scale, [*rows.values(), *weights.values()])
        calls.check()
    if left:
        raise UnsuitableError("the model keeps tensors in attributes")
    if any(grad is not None for grad in new[len(rows) :]):
        raise UnsuitableError("the loss depends on the original parameters")
    found = dict(zip(rows, new, strict=False))
    outer = Unconnected(problem, [*rows], derivable=False)
    outer.see(found)
    outer.check([*rows], InnerBatch(*term.query()[:2], None))
    totals = {name: torch.zeros_like(rows[name]) if grad is None else plain(grad) for name, grad in found.items()}
    return Computed(value.detach(), predicted.detach(), totals)


def _are_images(x: Tensor) -> bool:
    """Whether a set ``[T, N, C, H, W]`` is of images on a CPU. Each is an operator's group, with or without vmap."""
    return x.dim() == 5 and x.device.type == "cpu"


class _Calls:
    """Calls the model and the loss on each of a chunk's sets. Use this under `locked`.

    Args:
        problem: the model and loss.
        start: the weights that tasks start from.
        term: the sets.
    """

    def __init__(self, problem: Problem, start: Start, term: Adaptations) -> None:
        model, tasks = problem.model, count(term.query_x)
        found, sets = slots(model), sets_of(term)
        if not found.places.keys() >= start.own.keys() | start.kept.keys() | start.shared.keys():
            raise UnsuitableError("a parameter is not registered under its name")
        buffers = {name: b.clone() for name, b in named_buffers_of(model).items()}  # the model's own stay unchanged
        always = {**buffers, **start.shared} if buffers else start.shared
        run = as_settled(problem.run, model, problem.norm, tasks, loop=False)

        def of_task(own: Params, kept: Params, x: Tensor) -> Any:
            with swapped(found, {**always, **kept, **own}):
                out = run(x)
            if not isinstance(out, Tensor):
                raise UnsuitableError("a model must return one tensor here")
            return out

        loss = problem.readings.watched(problem.loss_fn)
        self._sets, self._kept = [(x, labels(y)) for x, y in sets], start.kept
        self._draws = Draws(problem, tasks, len(sets), term.query_x.device, loop=False)
        self._of_task, self._loss = of_task, over_tasks(lambda predicted, y: loss(predicted, *y))
        self._watched = [*always.values(), *start.kept.values(), *[x for x, _ in sets]]
        self._versions = [x._version for x in self._watched]

    def judged(self, number: int, own: Params) -> tuple[Tensor, Tensor]:
        """Losses ``[T]`` and predictions ``[T, N, ...]`` with these weights ``[T, *shape]`` on the set of a number."""
        (x, y), draws = self._sets[number], bool(self._draws.of_call)
        versions = [w._version for w in own.values()]
        with self._draws.functions(number)() if draws else nullcontext():
            lone = len(x) == 1 and not draws and _are_images(x)
            run = of_lone_task(self._of_task) if lone else over_tasks(self._of_task, "different" if draws else "error")
            predicted = run(own, self._kept, x)
        if versions != [w._version for w in own.values()]:
            raise UnsuitableError("the model changes its weights in place")
        value: Tensor = self._loss(predicted, y)
        if value.dim() != 1:
            raise UnsuitableError("a loss must return one number for each task")
        return value, predicted

    def check(self) -> None:
        """Refuse draws outside of the functions that draw, and writes in place, after all calls."""
        self._draws.check()
        if [x._version for x in self._watched] != self._versions:
            raise UnsuitableError("the model changes tensors in place")


AT_ONCE = FastPath(runs_at_once, at_once)
