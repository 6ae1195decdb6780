"""Meta-gradients of a batch of tasks: chunk by chunk and worker by worker, as they are or compiled.

Legend: T tasks, n workers with T/n tasks each, J inner steps, Q query points, d entries of all meta-parameters.

The parameters a worker starts from are a tensor of their own, ``[n, *shape]``, so that one backward pass leaves each
worker's gradient there and no gradient per task is ever stored.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from metamom.batch import TaskBatch, block
from metamom.common.checks import check_whole
from metamom.compile.graph import Compiled, CompileMode, check_compiler
from metamom.compile.tracing import is_tracing
from metamom.maml.batch_checks import check_batch
from metamom.maml.chunking import ChunkSize, spans, tasks_within_budget
from metamom.maml.draws import Step
from metamom.maml.estimators import Adaptations, InnerBatches, check_support, cut, passes
from metamom.maml.inner_loop import Problem, check_cut, episodes, trainable
from metamom.maml.inner_step import gradients, straight_through
from metamom.maml.misfits import check_one_tensor
from metamom.maml.task_weights import Params
from metamom.maml.tracking import Memory, distinct_ids
from metamom.maml.unused import from_outside
from metamom.maml.vmap_errors import explained
from metamom.server.aggregate import flatten

# Seconds that compiling takes for each layer and each pass through the model, measured on two cores.
COMPILE_SECONDS = 2.0


class Plan(NamedTuple):
    """How meta-gradients are computed.

    Attributes:
        owner: the module that holds model and loss; a compiled graph is tied to the modules in it.
        problem: whose meta-gradient it is.
        inner_steps: J.
        inner_batches: the same for all inner steps, or fresh ones.
        memory: of tracked estimators.
        chunk_size: tasks at a time.
    """

    owner: nn.Module
    problem: Problem
    inner_steps: int
    inner_batches: InnerBatches
    memory: Memory | None
    chunk_size: ChunkSize

    def cut(self, batch: TaskBatch) -> list[Adaptations]:
        """The adaptations whose weighted query losses are differentiated."""
        return cut(batch, self.problem.estimator, self.inner_steps, self.inner_batches)

    def check(self, batch: TaskBatch) -> None:
        """Refuse a batch that the estimator cannot take.

        Raises:
            ValueError: saying what is wrong.
        """
        check_batch(batch)
        check_support(batch, self.problem.estimator, self.inner_steps, self.inner_batches)
        if self.memory is not None:
            distinct_ids(batch.task_ids)

    def recall(self, batch: TaskBatch) -> Params:
        """What is remembered of the tasks; nothing by estimators that track none."""
        return {} if self.memory is None else self.memory.recall(batch.task_ids, self._trainable())

    def remember(self, task_ids: Tensor | None, averages: Sequence[Tensor], *results: Tensor) -> None:
        """Move the tasks' memory on, unless something would poison it."""
        if self.memory is not None and all(bool(x.isfinite().all()) for x in (*averages, *results)):
            self.memory.keep(task_ids, dict(zip(self.problem.adapted, averages, strict=True)), self._trainable())

    def _trainable(self) -> Params:
        return trainable(self.problem.model, self.problem.loss_fn)


class OfTasks(NamedTuple):
    """What a chunk's tasks came to.

    Attributes:
        losses: query losses ``[T]``.
        predictions: on the query sets, ``[T, Q, ...]``.
        averages: of tracked estimators, one ``[T, *shape]`` for each adapted parameter.
    """

    losses: Tensor
    predictions: Tensor
    averages: tuple[Tensor, ...] = ()

    @classmethod
    def joined(cls, parts: Sequence[OfTasks]) -> OfTasks:
        """Those of several chunks, one after the other."""
        if len(parts) == 1:
            return parts[0]
        averages = zip(*(part.averages for part in parts), strict=True)
        return cls(
            torch.cat([part.losses for part in parts]),
            torch.cat([part.predictions for part in parts]),
            tuple(torch.cat(each) for each in averages),
        )


class OfWorkers(NamedTuple):
    """Meta-gradients ``[k, d]`` of some workers, and what their tasks came to."""

    gradients: Tensor
    tasks: OfTasks


class MetaGradients:
    """Computes the meta-gradients of a plan.

    Args:
        plan: asked at every call, since a learner's options may be set at any time.
        compile: see `metamom.compile.graph.Compiled`.

    Attributes:
        expected: how many batches are still to come, where somebody said so.
    """

    def __init__(self, plan: Callable[[], Plan], compile: CompileMode) -> None:
        self.plan = plan
        self.expected: int | None = None
        self._budgets: dict[Hashable, int] = {}
        self._tried = False  # whether a meta-gradient to be compiled has been computed once without
        self.of_chunk: Callable[..., tuple[Tensor, ...]] = self.eager
        if compile:
            now = plan()
            model = now.problem.model
            if compile is True:
                check_compiler(next(model.parameters()).device)
            layers = sum(not list(module.children()) for module in model.modules())
            cost = COMPILE_SECONDS * layers * passes(now.problem.estimator, now.inner_steps)
            self.of_chunk = Compiled(self.eager, self.built_in, compile, cost)

    def by_worker(self, weights: Params, batch: TaskBatch, workers: int, number: int = 0) -> Iterator[OfWorkers]:
        """The workers' flattened meta-gradients, some at a time in their order, as chunks give them.

        Args:
            weights: the meta-parameters by name.
            batch: T tasks.
            workers: n, must divide T.
            number: of the first task in the batch of all processes, by which a random model draws.

        Raises:
            ValueError: as `MAML.meta_gradient`.
        """
        plan = self.plan()
        plan.check(batch)
        workers = check_whole("the number of workers", workers, 1)
        per_worker = len(block(batch.num_tasks, 0, workers))
        parts = list(spans(batch.num_tasks, self.chunk_size(batch), per_worker))
        self._announce(weights, batch, len(parts))
        rows: Tensor | None = None
        held: list[OfTasks] = []
        step = Step()
        for start, stop in parts:
            first, last = start // per_worker, -(-stop // per_worker)  # the workers whose tasks these are
            tasks = batch if len(parts) == 1 else batch.part(start, stop)
            with step.tasks(number + start, stop - start):
                found = self.of_chunk(weights, plan.recall(tasks), last - first, 1 / per_worker, *tasks[:4])
            averages = 2 + (0 if plan.memory is None else len(plan.problem.adapted))
            held.append(OfTasks(found[0], found[1], found[2:averages]))
            chunk = _flat(found[averages:])
            rows = chunk if rows is None else rows + chunk
            if stop % per_worker == 0:
                yield OfWorkers(rows, OfTasks.joined(held))
                rows, held = None, []

    def losses(self, weights: Params, batch: TaskBatch) -> Tensor:
        """Query losses ``[T]`` of the first adaptation, with the derivatives of all of them, weighted."""
        plan = self.plan()
        plan.check(batch)
        rows = {name: w.unsqueeze(0) for name, w in weights.items()}
        step, found = Step(), []
        for start, stop in spans(batch.num_tasks, self.chunk_size(batch), batch.num_tasks):
            with step.tasks(start, stop - start):
                found.append(_estimated_losses(plan, rows, batch.part(start, stop)))
        return torch.cat(found)

    def chunk_size(self, batch: TaskBatch) -> int | None:
        """The number of tasks at a time, measured where it is "auto"."""
        plan = self.plan()
        if plan.chunk_size != "auto":
            return plan.chunk_size
        key = (self.built_in(), *((x.shape[1:], x.dtype, x.device) for x in batch[:4]))
        if key not in self._budgets:
            weights = trainable(plan.problem.model, plan.problem.loss_fn) | plan.problem.step_sizes.learned()
            self._budgets[key] = tasks_within_budget(self._one_task(weights, batch), batch.part(0, 1))
        return self._budgets[key]

    def built_in(self) -> tuple[Hashable, ...]:
        """What a compiled meta-gradient has built in, apart from shapes.

        Modules, hooks, buffers and frozen parameters are among it, as the objects that they are: the values of tensors
        may change. A module's own numbers (the rate of a dropout) and plain tensors are not.
        """
        plan = self.plan()
        problem = plan.problem
        device = next(problem.model.parameters()).device.type
        around = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        fixed: list[Hashable] = [problem.loss_fn, around, *problem.step_sizes.fixed.values()]
        for module in plan.owner.modules():
            fixed += [module, module.training, *module._forward_hooks.values(), *module._forward_pre_hooks.values()]
            fixed += module._buffers.values()
            fixed += (p for p in module._parameters.values() if p is not None and not p.requires_grad)
        return plan.inner_steps, problem.estimator, plan.inner_batches, problem.autocast, *fixed

    def eager(self, weights: Params, memory: Params, workers: int, scale: float, *batch: Tensor) -> tuple[Tensor, ...]:
        """`chunk_gradient` of the plan of this moment."""
        return chunk_gradient(self.plan(), weights, memory, workers, scale, *batch)

    def _announce(self, weights: Params, batch: TaskBatch, chunks: int) -> None:
        """Say to what is compiled how many chunks are to come, after one that shows what may be wrong with a model."""
        if not isinstance(self.of_chunk, Compiled):
            return
        if not self._tried:  # as it is, for a graph does not show what is wrong with it
            with torch.random.fork_rng(devices=[]):
                self._one_task(weights, batch)()
            self._tried = True
        self.of_chunk.expected = None if self.expected is None else self.expected * chunks
        if self.expected is not None:  # nothing is known of batches beyond those
            self.expected = self.expected - 1 if self.expected > 1 else None

    def _one_task(self, weights: Params, batch: TaskBatch) -> Callable[[], tuple[Tensor, ...]]:
        """The meta-gradient of the first task, to be computed as it is."""
        one = batch.part(0, 1)
        return partial(self.eager, weights, self.plan().recall(one), 1, 1.0, *one[:4])


def chunk_gradient(
    plan: Plan, weights: Params, memory: Params, workers: int, scale: float, *batch: Tensor
) -> tuple[Tensor, ...]:
    """Query losses, predictions, tracked averages, gradients of ``scale`` times the losses' sum by worker.

    A flat tuple, as compiled graphs return it. Gradients are ``[workers, d]``, or ``[workers, *shape]`` each where a
    weight does not lie in memory as its indices go: a compiler would reorder it entry by entry in the middle of the
    sum over tasks.
    """
    problem = plan.problem
    first: tuple[Tensor, ...] = ()
    totals: list[Tensor] = []
    with torch.enable_grad():
        rows = {name: w.detach().expand(workers, *w.shape).requires_grad_() for name, w in weights.items()}
        around = {} if is_tracing() else weights  # what the losses must depend on by way of the rows alone
        for term in plan.cut(TaskBatch(*batch)):
            found = episodes(problem, rows, term, memory)
            check_one_tensor(found.predictions)
            with explained(problem.model):
                grads = gradients(found.losses.sum() * (scale * term.weight), [*rows.values(), *around.values()])
            past = [name for name, grad in zip(around, grads[len(rows) :], strict=True) if grad is not None]
            if past:
                raise from_outside(past)
            own = dict(zip(rows, grads[: len(rows)], strict=True))
            check_cut(problem, [name for name, grad in own.items() if grad is None], term.query_x, term.query_y)
            new = [torch.zeros_like(rows[name]) if grad is None else grad for name, grad in own.items()]
            if not totals:
                averages = [u.detach() for u in found.adapted.values()] if memory else []
                first = found.losses.detach()[:: term.copies], found.predictions.detach()[:: term.copies], *averages
            totals = [a + b for a, b in zip(totals, new, strict=True)] if totals else new
    if all(w.is_contiguous() for w in weights.values()):
        totals = [flatten(totals)]
    return *first, *totals


def _estimated_losses(plan: Plan, rows: Params, batch: TaskBatch) -> Tensor:
    memory = plan.recall(batch)
    each = [(term, episodes(plan.problem, rows, term, memory).losses.view(-1, term.copies)) for term in plan.cut(batch)]
    first = each[0][1][:, 0]
    if len(each) == 1 and each[0][0].copies == 1:
        return first
    return straight_through(first, torch.stack([term.weight * losses.sum(1) for term, losses in each]).sum(0))


def _flat(grads: Sequence[Tensor]) -> Tensor:
    """``[n, d]``; a lone gradient of two axes is flat already, one of another shape is a weight's own."""
    return grads[0] if len(grads) == 1 and grads[0].dim() == 2 else flatten(grads)
