"""Meta-gradients of a batch of tasks, computed by chunk and by worker, eagerly or compiled.

Legend: T tasks, n workers with T/n tasks each, J inner steps, Q query points, d entries of all meta-parameters.

Each worker starts from its own copy of the parameters, stacked as ``[n, *shape]``. One backward pass then gives each
worker's gradient, and no gradient per task is ever stored.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from metamom.batch import TaskBatch, block
from metamom.common.allocator import reuse_freed_memory
from metamom.common.checks import check_whole
from metamom.common.trees import flattened, mapped
from metamom.common.user_code import users_level
from metamom.compile.graph import Compiled, CompileMode, Graph, check_compiler
from metamom.compile.tracing import is_tracing
from metamom.maml.checks.hooks import forward_hooks_watched
from metamom.maml.chunk_gradient import chunk_gradient, estimated_losses
from metamom.maml.chunk_results import OfTasks, OfWorkers, with_chunk
from metamom.maml.chunking import spans, tasks_within_budget
from metamom.maml.estimators import ESTIMATORS, passes
from metamom.maml.fast_paths.fingerprint import Fingerprint
from metamom.maml.fast_paths.last_step import Again, LastStep, Run
from metamom.maml.inner_step import gradients
from metamom.maml.plan import Plan
from metamom.maml.running.plain_autograd import uncompiled
from metamom.maml.task_weights import Params
from metamom.maml.under_vmap.draws import Step

# Seconds to compile one layer in one pass through the model, measured on two cores.
COMPILE_SECONDS = 2.0


class MetaGradients:
    """Computes the meta-gradients of a plan.

    Args:
        plan: called for each meta-gradient, since a learner's options may be set at any time.
        compile: see `metamom.compile.graph.Compiled`.
        fingerprint: of a batch on a number of workers, with the learner as it is.

    Attributes:
        expected: how many batches are still to come, if announced.
    """

    def __init__(
        self,
        plan: Callable[[], Plan],
        compile: CompileMode,
        fingerprint: Callable[[TaskBatch, int], Fingerprint | None],
    ) -> None:
        self.plan = plan
        self.compile = compile
        self.last = LastStep(fingerprint)
        self.expected: int | None = None
        self._budgets: dict[Hashable, int] = {}
        self._hooked: set[str] = set()  # modules with forward hooks, of which the user was told
        self._told_of_anomalies = False
        self._tried = False  # whether a meta-gradient has been computed eagerly once before compiling it
        self.compiled: Compiled | None = None
        if compile:
            now = plan()
            model = now.problem.model
            if compile is True:
                check_compiler(next(model.parameters()).device)
            layers = sum(not list(module.children()) for module in model.modules())
            cost = COMPILE_SECONDS * layers * passes(now.problem.estimator, now.inner_steps)
            self.compiled = Compiled(self.eager, compile, cost)

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
        by_values = padded or ESTIMATORS[plan.problem.estimator].proximal or starts is not None
        of_chunk = self._of_chunk(plan, weights, batch, workers, parts, by_values=by_values)
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
            rows = with_chunk(rows, found[averages:])
            if stop % per_worker == 0:
                yield OfWorkers(rows, OfTasks.joined(held))
                rows, held = None, []

    def again(self, batch: TaskBatch, workers: int) -> Again | None:
        """The meta-gradient of a batch as the last one was computed, if nothing but values has changed since then."""
        try:
            found = self.last.again(batch, workers)
        except RuntimeError:
            if not self.compile:
                raise
            return None  # a graph says less about what is wrong than the general path does
        if found is not None and self.compile:
            self._expect_fewer()
        return found

    def _of_chunk(
        self,
        plan: Plan,
        weights: Params,
        batch: TaskBatch,
        workers: int,
        parts: list[tuple[int, int]],
        *,
        by_values: bool,
    ) -> Callable[..., tuple[Tensor, ...]]:
        """`chunk_gradient` with this plan, compiled if the learner is, unless it goes ``by_values``.

        If one chunk is all of the batch, `again` can compute the next batch in the same way.
        """
        remember: Callable[[Run], None] | None = None
        if not by_values and parts == [(0, batch.num_tasks)]:
            remember = self.last.forget(weights, batch, workers)
        if self.compiled is not None and not by_values and not self._is_watched():
            self._announce(self.compiled, weights, batch, len(parts))
            note = None if remember is None else lambda graph: remember(partial(_by_graph, graph, weights))
            return partial(self.compiled, plan.built_in(), note=note)

        def eagerly(*args: Any, **own: Any) -> tuple[Tensor, ...]:
            found = _eagerly(plan, *args, **own)
            if remember is not None:
                remember(partial(_whole_batch, plan, weights, workers, workers / batch.num_tasks))
            return found

        return eagerly

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

        size = self.chunk_size(plan, batch, derivative, "losses")
        for start, stop in spans(batch.num_tasks, size, batch.num_tasks):
            with step.tasks(start, stop - start):
                found.append(estimated_losses(plan, rows, batch.part(start, stop)))
        return torch.cat(found)

    def chunk_size(
        self,
        plan: Plan,
        batch: TaskBatch,
        compute: Callable[[TaskBatch], Any] | None = None,
        what: str = "meta-gradient",
    ) -> int | None:
        """The number of tasks at a time, measured if it is "auto": on a meta-gradient, or what else is to compute."""
        if plan.chunk_size != "auto":
            return plan.chunk_size
        key = (plan.kind(), what, *_kinds(batch))
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

    def eager(
        self, weights: Params, memory: Params, workers: int, scale: float, *batch: Any, starts: Params | None = None
    ) -> tuple[Tensor, ...]:
        """`chunk_gradient` with the current plan."""
        plan = self.plan()
        if not is_tracing():
            return _eagerly(plan, weights, memory, workers, scale, *batch, starts=starts)
        with forward_hooks_watched(plan.problem.model, everywhere=True) as hooked:
            found = _eagerly(plan, weights, memory, workers, scale, *batch, starts=starts)
        if not hooked <= self._hooked:
            self._hooked |= hooked
            warnings.warn(
                f"forward hooks of {', '.join(sorted(hooked))} run only while a graph is made, and not again. Run "
                "without compiling if what they do (record, print) has to be done in every step.",
                stacklevel=users_level(),
            )
        return found

    def _is_watched(self) -> bool:
        """Whether PyTorch looks for anomalies, which it does in eager backward passes only. Warn of it once."""
        if not torch.is_anomaly_enabled():
            return False
        if self.compile is True and not self._told_of_anomalies:
            self._told_of_anomalies = True
            warnings.warn(
                "torch.autograd.set_detect_anomaly looks at eager backward passes, so meta-gradients run without "
                "compiling while it is on.",
                stacklevel=users_level(),
            )
        return True

    def _announce(self, compiled: Compiled, weights: Params, batch: TaskBatch, chunks: int) -> None:
        """Tell the compiled function how many chunks follow, after an eager one that exposes errors in the model."""
        if not self._tried:  # eagerly, since a compiled graph hides errors in the model
            with torch.random.fork_rng(devices=[]):
                self._one_task(weights, batch)()
            self._tried = True
        compiled.expected = None if self.expected is None else self.expected * chunks
        self._expect_fewer()

    def _expect_fewer(self) -> None:
        """Count a batch that was announced. Nothing is known about batches after those."""
        if self.expected is not None:
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


def _whole_batch(plan: Plan, weights: Params, workers: int, scale: float, batch: TaskBatch) -> tuple[Tensor, ...]:
    """`chunk_gradient` of a batch without stored averages."""
    with Step().tasks(0, batch.num_tasks):
        return _eagerly(plan, weights, {}, workers, scale, *_arguments(batch))


def _by_graph(graph: Graph, weights: Params, batch: TaskBatch) -> tuple[Tensor, ...]:
    """The same by a compiled graph, which gets no numbers and no averages."""
    with torch.no_grad():
        return graph(*weights.values(), *[x for x in batch[:4] if x is not None])


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
