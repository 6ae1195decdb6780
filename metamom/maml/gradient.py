"""Meta-gradients of a batch of tasks, computed by chunk and by worker, eagerly or compiled.

Legend: T tasks, n workers with T/n tasks each, J inner steps, Q query points, d entries of all meta-parameters.

Each worker starts from its own copy of the parameters, stacked as ``[n, *shape]``. One backward pass then gives each
worker's gradient, and no gradient per task is ever stored.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec

from metamom.batch import TaskBatch, block
from metamom.common.allocator import reuse_freed_memory
from metamom.common.checks import check_whole
from metamom.common.trees import flattened, lone, mapped, restored
from metamom.compile.graph import Compiled, CompileMode, check_compiler
from metamom.compile.tracing import is_tracing
from metamom.maml.batch_checks import check_batch
from metamom.maml.chunking import ChunkSize, spans, tasks_within_budget
from metamom.maml.draws import Step
from metamom.maml.episodes import episodes, support_of
from metamom.maml.estimators import ESTIMATORS, Adaptations, InnerBatches, check_support, cut, passes
from metamom.maml.inner_step import gradients, straight_through
from metamom.maml.model_checks import has_global_hooks
from metamom.maml.plain_autograd import uncompiled
from metamom.maml.problem import Problem
from metamom.maml.step_gradients import check_cut
from metamom.maml.task_weights import Params
from metamom.maml.tracking import Memory, distinct_ids
from metamom.maml.unused import from_outside
from metamom.maml.vmap_errors import explained
from metamom.nets.low_rank import plain
from metamom.server.aggregate import flatten

# Seconds to compile one layer in one pass through the model, measured on two cores.
COMPILE_SECONDS = 2.0


class Plan(NamedTuple):
    """How meta-gradients are computed.

    Attributes:
        owner: the module that holds model and loss; a compiled graph is tied to the modules in it.
        problem: the model, loss and settings of the adaptation.
        inner_steps: J.
        inner_batches: the same for all inner steps, or fresh ones.
        memory: the moving averages of a tracked estimator.
        chunk_size: the number of tasks at a time.
    """

    owner: nn.Module
    problem: Problem
    inner_steps: int
    inner_batches: InnerBatches
    memory: Memory | None
    chunk_size: ChunkSize

    def cut(self, batch: TaskBatch) -> list[Adaptations]:
        """The adaptations to differentiate, with the weights of their query losses."""
        batch = self.problem.rule.adapted_on(batch)
        return cut(batch, self.problem.estimator, self.inner_steps, self.inner_batches)

    def kind(self) -> tuple[Hashable, ...]:
        """What the memory of a task depends on, apart from shapes. The run is another object for other modules."""
        problem = self.problem
        adaptation = self.inner_steps, self.inner_batches, problem.estimator, problem.objective is None
        settings = *adaptation, problem.autocast, problem.norm, problem.inner_optimizer
        looped = problem.vectorization.vectorize, frozenset(problem.vectorization.looped)
        return *settings, *looped, problem.run, problem.loss_fn, problem.model.training

    def check(self, batch: TaskBatch) -> None:
        """Refuse a batch that the estimator cannot take.

        Raises:
            ValueError: saying what is wrong.
        """
        check_batch(batch)
        adapted_on, rule = self.problem.rule.adapted_on(batch), self.problem.rule
        check_support(adapted_on, self.problem.estimator, self.inner_steps, self.inner_batches)
        if rule.check is not None:
            rule.check(batch)
        if self.memory is not None:
            distinct_ids(batch.task_ids)

    def recall(self, batch: TaskBatch) -> Params:
        """The stored averages of the batch's tasks; empty for an estimator that is not tracked."""
        return {} if self.memory is None else self.memory.recall(batch.task_ids, self._trainable())

    def remember(self, task_ids: Tensor | None, averages: Sequence[Tensor], *results: Tensor) -> None:
        """Update the tasks' averages, unless a result is not finite."""
        if self.memory is not None and all(bool(x.isfinite().all()) for x in (*averages, *results)):
            self.memory.keep(task_ids, dict(zip(self.problem.adapted, averages, strict=True)), self._trainable())

    def _trainable(self) -> Params:
        return self.problem.parameters()


class OfTasks(NamedTuple):
    """The results of a chunk of tasks.

    Attributes:
        losses: query losses ``[T]``.
        predictions: on the query sets, ``[T, Q, ...]``; ``[T, 0]`` if the model returns several tensors.
        averages: for tracked estimators, one ``[T, *shape]`` for each adapted parameter.
    """

    losses: Tensor
    predictions: Tensor
    averages: tuple[Tensor, ...] = ()

    @classmethod
    def joined(cls, parts: Sequence[OfTasks]) -> OfTasks:
        """Concatenate the results of several chunks."""
        if len(parts) == 1:
            return parts[0]
        averages = zip(*(part.averages for part in parts), strict=True)
        return cls(
            torch.cat([part.losses for part in parts]),
            torch.cat([part.predictions for part in parts]),
            tuple(torch.cat(each) for each in averages),
        )


class OfWorkers(NamedTuple):
    """Meta-gradients ``[k, d]`` of k workers, and the results of their tasks."""

    gradients: Tensor
    tasks: OfTasks


class MetaGradients:
    """Computes the meta-gradients of a plan.

    Args:
        plan: called for each meta-gradient, since a learner's options may be set at any time.
        compile: see `metamom.compile.graph.Compiled`.

    Attributes:
        expected: how many batches are still to come, if announced.
    """

    def __init__(self, plan: Callable[[], Plan], compile: CompileMode) -> None:
        self.plan = plan
        self.compile = compile
        self.expected: int | None = None
        self._budgets: dict[Hashable, int] = {}
        self._tried = False  # whether a meta-gradient has been computed eagerly once before compiling it
        self.of_chunk: Callable[..., tuple[Tensor, ...]] = self.eager
        if compile:
            now = plan()
            model = now.problem.model
            if compile is True:
                check_compiler(next(model.parameters()).device)
            layers = sum(not list(module.children()) for module in model.modules())
            cost = COMPILE_SECONDS * layers * passes(now.problem.estimator, now.inner_steps)
            self.of_chunk = Compiled(self.eager, self.built_in, compile, cost)

    def by_worker(
        self,
        weights: Params,
        batch: TaskBatch,
        workers: int,
        number: int = 0,
        *,
        present: Sequence[int] | None = None,
        starts: Params | None = None,
        plan: Plan | None = None,
    ) -> Iterator[OfWorkers]:
        """Yield the workers' flattened meta-gradients in order, a few at a time as chunks finish.

        Args:
            weights: the meta-parameters by name.
            batch: T tasks.
            workers: n, must divide T.
            number: the index of the first task in the batch of all processes, which seeds a random model's draws.
            present: the workers, of 0 to n - 1, to compute; all by default.
            starts: the weights ``[k, *shape]`` of these k workers, if they are not the meta-parameters.
            plan: the current one, if the caller has checked the batch by it.

        Raises:
            ValueError: as `MAML.meta_gradient`.
        """
        reuse_freed_memory()
        if plan is None:
            plan = self.plan()
            plan.check(batch)
        workers = check_whole("the number of workers", workers, 1)
        per_worker = len(block(batch.num_tasks, 0, workers))
        everyone = range(workers) if present is None else present
        parts = self._parts(everyone, per_worker, self.chunk_size(plan, batch), alike=present is not None)
        padded = batch.support_mask is not None or batch.query_mask is not None
        # a loop over unpadded tasks, and the end of a solve, depend on values
        alone = padded or ESTIMATORS[plan.problem.estimator].proximal or starts is not None
        compiled = bool(self.compile) and not alone
        if compiled:
            self._announce(weights, batch, len(parts))
        of_chunk = self.of_chunk if compiled else partial(_eagerly, plan)
        rows: Tensor | None = None
        held: list[OfTasks] = []
        step = Step()
        if present is not None:  # processes without present workers draw a seed too
            step.seed()
        for start, stop in parts:
            first, last = start // per_worker, -(-stop // per_worker)  # the workers whose tasks these are
            tasks = batch if stop - start == batch.num_tasks else batch.part(start, stop)
            own = {}
            if starts is not None:
                row = everyone.index(first)
                own = {"starts": {name: w[row : row + last - first] for name, w in starts.items()}}
            with step.tasks(number + start, stop - start):
                found = of_chunk(weights, plan.recall(tasks), last - first, 1 / per_worker, *_arguments(tasks), **own)
            averages = 2 + (0 if plan.memory is None else len(plan.problem.adapted))
            held.append(OfTasks(found[0], found[1], found[2:averages]))
            rows = _with_chunk(rows, found[averages:])
            if stop % per_worker == 0:
                yield OfWorkers(rows, OfTasks.joined(held))
                rows, held = None, []

    def _parts(
        self, everyone: Sequence[int], per_worker: int, size: int | None, *, alike: bool
    ) -> list[tuple[int, int]]:
        """The chunks of tasks of these workers. Compiled ones are ``alike``: of one worker, or a part of it."""
        runs = [range(i, i + 1) for i in everyone] if alike and self.compile else _consecutive(everyone)
        return [
            (run.start * per_worker + start, run.start * per_worker + stop)
            for run in runs
            for start, stop in spans(len(run) * per_worker, size, per_worker)
        ]

    def losses(self, weights: Params, batch: TaskBatch) -> Tensor:
        """Query losses ``[T]`` of the first adaptation, with the weighted derivatives of all adaptations."""
        plan = self.plan()
        plan.check(batch)
        rows = {name: w.unsqueeze(0) for name, w in weights.items()}
        step, found = Step(), []

        def derivative(one: TaskBatch) -> None:
            """Of the losses, which frees their graph."""
            with torch.enable_grad():
                own = {name: w.detach().unsqueeze(0).requires_grad_() for name, w in weights.items()}
                gradients(estimated_losses(plan, own, one).sum(), [*own.values()])

        size = self.chunk_size(plan, batch, derivative)
        for start, stop in spans(batch.num_tasks, size, batch.num_tasks):
            with step.tasks(start, stop - start):
                found.append(estimated_losses(plan, rows, batch.part(start, stop)))
        return torch.cat(found)

    def chunk_size(self, plan: Plan, batch: TaskBatch, compute: Callable[[TaskBatch], Any] | None = None) -> int | None:
        """The number of tasks at a time, measured if it is "auto": on a meta-gradient, or what else is to compute."""
        if plan.chunk_size != "auto":
            return plan.chunk_size
        key = (plan.kind(), compute is None, *_kinds(batch))
        if key not in self._budgets:
            weights = plan.problem.parameters() | plan.problem.step_sizes.learned()
            # a copy, since what is saved of a view would count as the whole batch
            first = batch.part(0, 1)
            one = TaskBatch(*(mapped(Tensor.clone, x) for x in first))
            of_one = self._one_task(weights, one) if compute is None else partial(compute, one)
            adapted = sum(weights[name].nbytes for name in plan.problem.adapted if name in weights)
            with plan.problem.solves.trying():
                self._budgets[key] = tasks_within_budget(of_one, one, adapted)
        return self._budgets[key]

    def built_in(self) -> tuple[Hashable, ...]:
        """The objects that a compiled meta-gradient depends on, apart from shapes.

        Modules, hooks, buffers and frozen parameters are compared by identity: the values of their tensors may change.
        A module's own numbers (a dropout rate) and plain tensors are not included.
        """
        plan = self.plan()
        problem = plan.problem
        device = next(problem.model.parameters()).device.type
        around = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        fixed: list[Hashable] = [problem.loss_fn, around, *problem.step_sizes.fixed.values()]
        for module in plan.owner.modules():
            fixed += [module, module.training, *module._forward_hooks.values(), *module._forward_pre_hooks.values()]
            fixed += [*module._backward_hooks.values(), *module._backward_pre_hooks.values()]
            fixed += module._buffers.values()
            fixed += (p for p in module._parameters.values() if p is not None and not p.requires_grad)
        vectorization = problem.vectorization
        fixed += [vectorization.vectorize, frozenset(vectorization.looped), has_global_hooks(), problem.norm]
        fixed.append(problem.objective is None)
        adaptation = plan.inner_steps, problem.estimator, plan.inner_batches, problem.inner_optimizer
        return *adaptation, problem.autocast, *fixed

    def eager(
        self, weights: Params, memory: Params, workers: int, scale: float, *batch: Any, starts: Params | None = None
    ) -> tuple[Tensor, ...]:
        """`chunk_gradient` with the current plan."""
        return _eagerly(self.plan(), weights, memory, workers, scale, *batch, starts=starts)

    def _announce(self, weights: Params, batch: TaskBatch, chunks: int) -> None:
        """Tell the compiled function how many chunks follow, after an eager one that exposes errors in the model."""
        if not isinstance(self.of_chunk, Compiled):
            return
        if not self._tried:  # eagerly, since a compiled graph hides errors in the model
            with torch.random.fork_rng(devices=[]):
                self._one_task(weights, batch)()
            self._tried = True
        self.of_chunk.expected = None if self.expected is None else self.expected * chunks
        if self.expected is not None:  # nothing is known about batches after those
            self.expected = self.expected - 1 if self.expected > 1 else None

    def _one_task(self, weights: Params, batch: TaskBatch) -> Callable[[], tuple[Tensor, ...]]:
        """A function that computes the meta-gradient of the first task eagerly."""
        one = batch.part(0, 1)
        return partial(self.eager, weights, self.plan().recall(one), 1, 1.0, *_arguments(one))


def _eagerly(plan: Plan, *args: Any, starts: Params | None = None) -> tuple[Tensor, ...]:
    """`chunk_gradient`, in a loop over the tasks if vmap cannot take the model or the loss."""
    given: dict[str, Any] = {} if starts is None else {"starts": starts}
    with uncompiled():
        problem = plan.problem
        return problem.vectorization.attempt(problem.parts(), partial(chunk_gradient, plan, *args, **given))


def chunk_gradient(
    plan: Plan,
    weights: Params,
    memory: Params,
    workers: int,
    scale: float,
    form: TreeSpec,
    *batch: Tensor,
    starts: Params | None = None,
) -> tuple[Tensor, ...]:
    """Query losses, predictions, tracked averages, and each worker's gradient of ``scale`` times the sum of losses.

    The batch comes as its form and its tensors (`metamom.common.trees.flattened`), as compiled graphs take it. The
    result is a flat tuple, as they return it. Gradients are ``[workers, *shape]`` for each parameter. In a graph they
    are ``[workers, d]``, unless a weight is not contiguous: a compiler would reorder it entry by entry in the middle of
    the sum over tasks. With ``starts`` ``[workers, *shape]``, each worker's gradient is that at its own weights.
    """
    problem = plan.problem
    first: tuple[Tensor, ...] = ()
    totals: list[Tensor] = []
    with torch.enable_grad():
        rows = {
            name: (w.detach().expand(workers, *w.shape) if starts is None else starts[name].detach()).requires_grad_()
            for name, w in weights.items()
        }
        around = {} if is_tracing() else weights  # the losses may depend on these through the rows only
        fields = restored(form, batch)
        tasks = TaskBatch(*fields[:4])._replace(support_mask=fields[4], query_mask=fields[5])
        for term in plan.cut(tasks):
            found = episodes(problem, rows, term, memory)
            with explained(problem.model, loop=problem.loops()):
                grads = gradients(found.objective.sum() * (scale * term.weight), [*rows.values(), *around.values()])
            past = [name for name, grad in zip(around, grads[len(rows) :], strict=True) if grad is not None]
            if past:
                raise from_outside(past)
            own = dict(zip(rows, grads[: len(rows)], strict=True))
            missing = [name for name, grad in own.items() if grad is None]
            check_cut(problem, missing, *term.query(), support_of(problem, term))
            new = [torch.zeros_like(rows[name]) if grad is None else plain(grad) for name, grad in own.items()]
            if not totals:
                averages = [plain(u).detach() for u in found.adapted.values()] if memory else []
                judged = lone(found.predictions)
                judged = found.losses.new_empty(len(found.losses), 0) if judged is None else judged
                first = found.losses.detach()[:: term.copies], judged.detach()[:: term.copies], *averages
            totals = [a + b for a, b in zip(totals, new, strict=True)] if totals else new
    if is_tracing() and all(w.is_contiguous() for w in weights.values()):
        totals = [flatten(totals)]
    return *first, *totals


def estimated_losses(plan: Plan, rows: Params, batch: TaskBatch) -> Tensor:
    """The tasks' query losses ``[T]`` as functions of the workers' parameters ``[n, *shape]``, with their graph."""
    memory = plan.recall(batch)
    thin = not torch.is_grad_enabled()  # the caller may keep the graph
    found = [(term, episodes(plan.problem, rows, term, memory, thin=thin)) for term in plan.cut(batch)]
    each = [(term, results.objective.view(-1, term.copies)) for term, results in found]
    first = found[0][1].losses.view(-1, found[0][0].copies)[:, 0]
    if len(each) == 1 and each[0][0].copies == 1 and plan.problem.objective is None:
        return each[0][1][:, 0]
    return straight_through(first, torch.stack([term.weight * losses.sum(1) for term, losses in each]).sum(0))


def _arguments(batch: TaskBatch) -> tuple[Any, ...]:
    """A batch as arguments of `chunk_gradient`."""
    form, tensors = flattened((*batch[:4], *batch[5:]))
    return form, *tensors


def _kinds(batch: TaskBatch) -> tuple[Hashable, ...]:
    """The form of a batch, and everything about its tensors except the number of tasks and the values."""
    fields = (*batch[:4], *batch[5:])
    if all(x is None or isinstance(x, Tensor) for x in fields):  # quickly, for every step
        return tuple([None if x is None else (x.shape[1:], x.dtype, x.device) for x in fields])
    form, tensors = flattened(fields)
    return str(form), *((x.shape[1:], x.dtype, x.device) for x in tensors)  # the form itself cannot be copied


def _consecutive(numbers: Sequence[int]) -> Iterator[range]:
    """The runs of consecutive numbers in an ascending sequence."""
    start = 0
    for i in range(1, len(numbers) + 1):
        if i == len(numbers) or numbers[i] != numbers[i - 1] + 1:
            yield range(numbers[start], numbers[i - 1] + 1)
            start = i


def _with_chunk(rows: Tensor | None, grads: Sequence[Tensor]) -> Tensor:
    """The sum of a chunk's gradients and ``rows`` ``[n, d]``, in the memory of the latter if there are any."""
    if rows is None:
        return _flat(grads)
    if len(grads) == 1:
        return rows.add_(_flat(grads))
    size = [g[0].numel() for g in grads]
    for row, g in zip(rows.split_with_sizes(size, 1), grads, strict=True):
        row.add_(g.reshape(row.shape))
    return rows


def _flat(grads: Sequence[Tensor]) -> Tensor:
    """Flatten to ``[n, d]``. A single gradient with two axes is flat already; with more, it is one weight's."""
    return grads[0] if len(grads) == 1 and grads[0].dim() == 2 else flatten(grads)
