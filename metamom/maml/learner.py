"""MAML: adaptation by gradient steps, and meta-gradients through it, for all tasks at once.

Legend: T tasks, n workers with T/n tasks each, S support points, Q query points, J inner steps.

Two kinds of derivatives are taken, both by plain autograd over a forward pass that `torch.func.vmap` batches over
tasks. (Differentiating from outside vmap over an inner `torch.func.grad` is wrong for affine normalisation layers
in torch 2.13.) The parameters a worker starts from are a tensor of their own, ``[n, *shape]``, so that one backward
pass leaves each worker's gradient there and no gradient per task is ever stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metamom.batch import TaskBatch, block
from metamom.bias import Bias, BiasOperator, NonFiniteError, as_operator
from metamom.bias.checks import all_finite
from metamom.common.checks import check_whole
from metamom.compile.graph import Compiled, CompileMode, check_compiler
from metamom.compile.tracing import is_tracing
from metamom.distributed import World, as_world
from metamom.maml.batch_checks import check_adapted, check_batch, check_set, refuse_non_finite
from metamom.maml.chunking import ChunkSize, spans, tasks_within_budget
from metamom.maml.draws import Step
from metamom.maml.estimators import (
    TRACKED,
    Adaptations,
    Estimator,
    InnerBatch,
    InnerBatches,
    check_estimator,
    check_support,
    cut,
    passes,
    support_parts,
)
from metamom.maml.finite_differences import Losses
from metamom.maml.inner_lr import LearnInnerLR, StepSizes
from metamom.maml.inner_step import Derivatives, gradients, inner_gradient, inner_step, straight_through
from metamom.maml.loss_readings import LossFn as LossFn
from metamom.maml.loss_readings import LossReadings
from metamom.maml.metrics import accuracy
from metamom.maml.misfits import asserts_explained, check_loss, check_one_tensor, targets_explained
from metamom.maml.model_checks import check_kind
from metamom.maml.options import check_compile, check_loss_owner, check_option, check_replacement
from metamom.maml.run_by_task import RunByTask
from metamom.maml.selection import selected
from metamom.maml.swapping import alone, named, slots, swapped
from metamom.maml.task_weights import Params, Start, deal
from metamom.maml.tracking import TRACKING, Memory, check_tracking, distinct_ids, tracked
from metamom.maml.unused import changes, cut_off, differentiable_once, from_outside
from metamom.maml.vmap_errors import check_model, explained
from metamom.server.aggregate import Aggregation, deliver, flatten, unflatten
from metamom.server.robust import Aggregate

LOSS = "loss_fn."  # before the names of a loss module's parameters

# Seconds that compiling takes for each layer and each pass through the model, measured on two cores.
COMPILE_SECONDS = 2.0


class MetaGradient(NamedTuple):
    """What `MAML.meta_gradient` returns: the workers' meta-gradients and the tasks' query losses (of `MAML.losses`)."""

    grads: Params
    losses: Tensor


class Backward(NamedTuple):
    """What `MAML.backward` returns.

    Attributes:
        loss: mean query loss over the tasks, a 0-d tensor without a graph.
        metrics: ``accuracy`` (of the query sets; ``None`` for regression), ``grad_norm`` (of the aggregate),
            ``bias_error`` (how far the operator moved the mean gradient, relative to that gradient's norm; ``None``
            where it was not measured), ``wire_bytes`` (of the workers' messages to the server) and ``sent_bytes``
            (what processes sent each other in this step, all of them together: see `metamom.distributed.World`).
    """

    loss: Tensor
    metrics: dict[str, float | int | None]


class MAML(nn.Module):
    """Model-agnostic meta-learning around any model, with exact second-order meta-gradients.

    From weights w, a task's adapted weights after J inner steps are ``u_0 = w,
    u_{j+1} = u_j - alpha * grad L_support(u_j)``; its meta-loss is ``L_query(u_J)``.

    Args:
        model: maps ``[N, ...]`` to predictions ``[N, ...]``. It runs under `torch.func.vmap` with weights of their own
            for each task: no running statistics, no in-place changes, no data-dependent control flow.
        loss_fn: ``(predictions [N, ...], targets [N, ...]) -> 0-d loss``, such as `torch.nn.functional.mse_loss`. The
            parameters of a loss that is a module are learned with the model's; inner steps do not move them.
        inner_lr: alpha > 0; one number, or for each adapted parameter a number or a tensor. Leaf tensors that require a
            gradient are learned, as the tensors that they are. May be set later: ``learner.inner_lr = 0.1``.
        inner_steps: J >= 1.
        estimator: of the meta-gradient. ``"exact"`` differentiates through the adaptation; ``"first-order"`` takes the
            adapted weights' gradient as the meta-gradient (FO-MAML). The others cut each support set in halves A and
            B: ``"independent"`` goes along A with the Hessians of B; ``"hessian-free"`` does so by differences of
            gradients, without second derivatives (HF-MAML; for smooth models: the kinks of many ReLUs make it noisy);
            ``"cross-fit"`` is the mean of ``"independent"`` and of the same with A and B swapped; ``"richardson"`` is
            ``2 g(all) - [g(A) + g(B)]/2`` with g the exact one. ``"moml"`` and ``"scsc"`` are ``"independent"`` with,
            for u_1, an average over each task's visits that is kept by its ``task_ids``, so tasks must stay
            (`metamom.tasks.FixedTasks`): `metamom.maml.tracking`. ``"moml-coupled"`` takes all points for both, as
            MOML's public code does, but without the factor ``tracking`` that this has on the meta-gradient. One inner
            step.
        inner_batches: ``"same"`` support points for every inner step, or ``"fresh"`` ones: J consecutive parts of the
            support set (of each half). A support set must divide into `support_parts` parts.
        tracking: b_u in (0, 1], the weight of a new inner step in the averages of ``"moml"``, ``"moml-coupled"`` and
            ``"scsc"``; 0.2 by default, 1 for no average at all.
        learn_inner_lr: learn alpha with the weights: ``True`` or ``"entry"`` (Meta-SGD), ``"tensor"``, ``"scalar"``.
        adapt: which parameters the inner steps move: names of parameters or of modules, or a predicate on a
            parameter's name; all trainable ones by default. ANIL is ``adapt=["head"]``.
        chunk_size: compute at most so many tasks at a time; bounds the memory, not the result (but for what a
            compiled model draws at random). ``"auto"`` measures what a task needs and takes about 512 MiB at
            a time on a CPU, half of what is free on a GPU.
        compile: compile the whole meta-gradient, once for each shape of batch, and anew where the loss, a module, a
            hook, a buffer or a frozen parameter is replaced. What else model or loss read (a dropout's rate, a plain
            tensor) is compiled in: make another learner where that changes. ``"auto"`` compiles only once it pays (see
            `expect`), and goes on without it, with one warning, where compiling fails.
        autocast: dtype of the model's matrix products and convolutions, `torch.bfloat16`, which accumulate in
            float32; weights, gradients, normalisation and losses stay as they are. It costs accuracy (8 bits; see
            docs/performance.md for how much), and is faster only on hardware that multiplies in bfloat16.

    What a model draws at random (dropout) depends on torch's generator at the start of a step and on the task's number
    in the batch, not on the chunk or the process that it is computed in; in a compiled meta-gradient it depends on the
    chunk. Several threads may adapt, predict and evaluate with one learner, or with learners that share modules: a
    model runs for one of them at a time.

    Attributes:
        memory: the averages of tracked estimators, part of the ``state_dict``; ``None`` for the others.
        operators: those that `backward` was given as a SPEC, each made once. With error feedback, save their
            ``state_dict()`` with the learner's.

    Raises:
        ValueError: for an option out of range or that doesn't go with the estimator, an unknown parameter name, a model
            with running statistics, or ``compile=True`` where there is no compiler; from its methods, for a model in
            which the graph between a parameter and the loss is cut, or that reads weights that are not the tasks'.

    Example:
        >>> from torch.nn import functional as F
        >>> from metamom.tasks import Sinusoid
        >>> learner = MAML(nn.Linear(1, 1), F.mse_loss, inner_lr=0.01)
        >>> grads, losses = learner.meta_gradient(Sinusoid().sample(0, 4), workers=2)
        >>> grads["weight"].shape, losses.shape
        (torch.Size([2, 1, 1]), torch.Size([4]))

        With Hessians on a batch of their own, from twice the points:

        >>> learner = MAML(nn.Linear(1, 1), F.mse_loss, estimator="independent")
        >>> batch = Sinusoid(shots=10 * learner.support_parts).sample(0, 4)
        >>> batch.support_x.shape, learner.meta_gradient(batch).grads["weight"].shape
        (torch.Size([4, 20, 1]), torch.Size([1, 1, 1]))

    Reference:
        Finn, Abbeel, Levine (2017), algorithm 1; the composite gradient of arXiv 2403.00853; for Hessians on a batch of
        their own, and by differences, Fallah, Mokhtari, Ozdaglar (2020). Which estimator has what bias: docs/theory.md.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        *,
        inner_lr: float | Tensor | Mapping[str, float | Tensor] = 0.01,
        inner_steps: int = 1,
        estimator: Estimator = "exact",
        inner_batches: InnerBatches = "same",
        tracking: float | None = None,
        learn_inner_lr: LearnInnerLR = False,
        adapt: Iterable[str] | Callable[[str], bool] | None = None,
        chunk_size: ChunkSize = None,
        compile: CompileMode = False,
        autocast: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_estimator(estimator, inner_batches)
        check_option("inner_steps", inner_steps)
        check_option("loss_fn", loss_fn)
        check_tracking(estimator, tracking, inner_steps, learn_inner_lr)
        check_compile(compile)
        check_kind(model)
        check_model(model)
        self.model = model
        self.loss_fn = loss_fn
        self.inner_steps = inner_steps
        self.estimator: Estimator = estimator
        self.inner_batches: InnerBatches = inner_batches
        self.chunk_size = chunk_size
        self.autocast = autocast
        weights = self._weights()
        self.adapted = selected(adapt, {name: p for name, p in named(model).items() if p.requires_grad})
        self.step_sizes = StepSizes(inner_lr, {name: weights[name] for name in self.adapted}, learn_inner_lr)
        self.memory: Memory | None = None
        if estimator in TRACKED:
            self.memory = Memory(estimator, TRACKING if tracking is None else tracking, weights, self.adapted)
        self._gradient: Callable[..., tuple[Tensor, ...]] = self._gradient_of_chunk
        self._expected: int | None = None
        self._budgets: dict[Hashable, int] = {}
        self.operators: dict[str, BiasOperator | None] = {}
        self._tried = False  # whether a meta-gradient to be compiled has been computed once without
        self._unused: set[str] = set()  # parameters that the model has been found not to use
        self._constant: set[str] = set()  # parameters whose gradients have been found not to depend on the weights
        self._readings = LossReadings()
        self._run = RunByTask()
        if compile:
            if compile is True:
                check_compiler(next(model.parameters()).device)
            layers = sum(not list(module.children()) for module in model.modules())
            cost = COMPILE_SECONDS * layers * passes(estimator, inner_steps)
            self._gradient = Compiled(self._gradient_of_chunk, self._settings, compile, cost)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; options of the constructor are checked as there.

        Raises:
            AttributeError: for an option that only the constructor takes.
            ValueError: for a value out of range, or another model with other parameters.
            TypeError: for a value of the wrong kind.
        """
        if name == "inner_lr":
            weights = self._weights()
            self.step_sizes.assign(value, {n: weights[n] for n in self.adapted})
            return
        check_option(name, value)
        if "_run" in self.__dict__:  # it has been made
            self._check_change(name, value)
        if name == "loss_fn":
            check_loss_owner(value)
            self._modules.pop(name, None)  # a module in place of a function, or the other way round
        super().__setattr__(name, value)

    def _check_change(self, name: str, value: Any) -> None:
        """Refuse what does not go with the other options."""
        if name == "model":
            check_kind(value)
            check_model(value)
            check_replacement(self.model, value)
            self._run = RunByTask()
        if name in ("estimator", "inner_batches", "inner_steps"):
            estimator: Estimator = value if name == "estimator" else self.estimator
            check_estimator(estimator, value if name == "inner_batches" else self.inner_batches)
            steps = value if name == "inner_steps" else self.inner_steps
            tracking = None if self.memory is None else self.memory.tracking
            check_tracking(estimator, tracking, steps, self.step_sizes.kind)
            if name == "estimator" and (value in TRACKED or self.estimator in TRACKED) and value != self.estimator:
                raise ValueError(
                    f"a learner with estimator {self.estimator!r} cannot go on with {value!r}, which remembers other "
                    "things of the tasks: make another learner around the same model."
                )

    @property
    def inner_lr(self) -> float | Tensor | dict[str, float | Tensor]:
        """The inner step sizes in force: one number (or learned tensor) for all, else by parameter.

        May be set, to what the constructor takes: learned step sizes are then learned on from there.
        """
        return self.step_sizes.values()

    def describe(self) -> dict[str, Any]:
        """The options that make this learner again, as JSON values."""
        return {
            "inner_lr": self.step_sizes.describe(),
            "inner_steps": self.inner_steps,
            "estimator": self.estimator,
            "inner_batches": self.inner_batches,
            "adapt": list(self.adapted),
            **({} if self.memory is None else {"tracking": self.memory.tracking}),
        }

    @property
    def support_parts(self) -> int:
        """The number of equal parts that a support set is cut into for a meta-gradient; 1 where it is used as it is.

        A sampler of ``shots=learner.support_parts * m`` gives inner batches of m shots each.
        """
        return support_parts(self.estimator, self.inner_steps, self.inner_batches)

    def reset_tracking(self) -> None:
        """Forget the averages of tracked estimators: each task's next visit is its first. Others have none."""
        if self.memory is not None:
            self.memory.reset()

    def expect(self, iterations: int) -> None:
        """Tell how many meta-gradients are still to come: what ``compile="auto"`` decides by; `metamom.train` does.

        Without it, ``"auto"`` reckons with as many to come as there have been.

        Raises:
            ValueError: for a number below 0.
        """
        if iterations < 0:
            raise ValueError(f"iterations to come must be >= 0; got {iterations}.")
        self._expected = iterations

    def meta_parameters(self) -> Params:
        """What meta-gradients are taken for, by name: the trainable parameters of model and loss, learned step sizes.

        Names are those of ``model.named_parameters()``. Parameters of a ``loss_fn`` that is a module follow as
        ``"loss_fn.NAME"`` (inner steps do not move them), step sizes as ``"inner_lr.NAME"`` or ``"inner_lr"``.
        """
        return self._weights() | self.step_sizes.learned()

    def adapt(self, support_x: Tensor, support_y: Tensor, *, steps: int | None = None) -> Params:
        """Adapt to each task's support set, all of it in every step whatever the estimator.

        Args:
            support_x: ``[T, S, ...]``.
            support_y: ``[T, S, ...]``.
            steps: number of inner steps >= 0; the learner's own by default.

        Returns:
            Adapted parameters by name, ``[T, *shape]``; differentiable in the meta-parameters where gradients are
            enabled. Use them with `predict`.
        """
        along = _whole(support_x, support_y, self.inner_steps if steps is None else steps)
        start = self._deal(self._one_row(), support_x.shape[0])
        *_, adapted = self._trajectory(start, along, keep_graph=torch.is_grad_enabled())
        return adapted

    def trajectory(self, support_x: Tensor, support_y: Tensor, *, steps: int) -> Iterator[Params]:
        """The adapted parameters after 0, 1, ..., ``steps`` inner steps, each as from `adapt` but without a graph."""
        along = _whole(support_x, support_y, steps)
        start = self._deal({name: row.detach() for name, row in self._one_row().items()}, support_x.shape[0])
        return self._trajectory(start, along, keep_graph=False)

    def predict(self, params: Params, x: Tensor) -> Tensor:
        """Predictions ``[T, N, ...]`` of T tasks' adapted weights (from `adapt`) on their inputs ``x: [T, N, ...]``."""
        check_adapted(params, x, named(self.model))
        return self._predictions(Start(params, {}, {}, {}), params, x)

    def judge(self, params: Params, predictions: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """What predictions ``[T, N, ...]`` are worth, task by task.

        Args:
            params: the adapted weights that they are by, which a loss module may share with the model.
            predictions: from `predict`.
            y: their targets, ``[T, N, ...]``.

        Returns:
            The losses ``[T]``, and the accuracies ``[T]`` or ``None``: see `metamom.maml.metrics.accuracy`.
        """
        return self._losses(Start(params, {}, {}, {}), params, predictions, y), self._accuracy(predictions, y)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As of any module; safe while other threads use this learner to predict."""
        with alone(self):
            return super().state_dict(*args, **kwargs)

    def losses(self, batch: TaskBatch) -> Tensor:
        """Each task's query loss after adaptation, ``[T]``.

        Differentiable in the meta-parameters where gradients are enabled; the derivative is the estimator's. The loss
        itself is one that adapts as `adapt` does on what the estimator's first inner steps go along: half A for
        ``"independent"``, ``"hessian-free"`` and ``"cross-fit"``, all points for the others (where inner batches are
        fresh, their parts in turn). Of tracked estimators it is the loss at the averages that `meta_gradient` would
        take; only that, and `backward`, move the memory on.

        Raises:
            ValueError: as `meta_gradient`.
        """
        self._check(batch)
        rows = self._one_row()
        step, found = Step(), []
        for start, stop in spans(batch.num_tasks, self._chunk_size(batch), batch.num_tasks):
            with step.tasks(start, stop - start):
                found.append(self._estimated_losses(rows, batch.part(start, stop)))
        return torch.cat(found)

    def meta_gradient(self, batch: TaskBatch, workers: int = 1) -> MetaGradient:
        """Each worker's composite meta-gradient, the mean over its own tasks.

        ``g_i = 1/m sum_t d L_query,t(u_J,t) / dw`` over the m = T/n tasks that `TaskBatch.split` deals to worker i.
        The memory of tracked estimators moves on, but not where a loss or a gradient is not finite.

        Args:
            batch: T tasks.
            workers: n >= 1, must divide T.

        Returns:
            ``(grads, losses)``: ``{name: [n, *shape]}`` for every meta-parameter, and query losses ``[T]``; no graph
            is kept.

        Raises:
            ValueError: if n does not divide T, the estimator cannot cut the support sets into its `support_parts`, the
                model cannot run under per-task weights, or a tracked estimator gets tasks without ids.
        """
        weights = self.meta_parameters()
        rows, of_tasks = zip(*self._gradients(weights, batch, workers), strict=True)
        grads = _joined(rows)
        losses, _, *averages = map(_joined, zip(*of_tasks, strict=True))
        self._remember(batch.task_ids, averages, grads, losses)
        return MetaGradient(unflatten(grads, weights), losses)

    @asserts_explained()
    def backward(
        self,
        batch: TaskBatch,
        *,
        workers: int = 1,
        bias: Bias = None,
        aggregate: Aggregate = "mean",
        world: World | None = None,
        measure: bool = True,
    ) -> Backward:
        """Add the aggregated, biased meta-gradient ``1/n sum_i C(g_i)`` to ``.grad``, as a backward pass does.

        Args:
            batch: T tasks; of several processes, this one's block (`metamom.distributed.World.sample`).
            workers: n >= 1, over all processes; must divide the number of all tasks.
            bias: the operator C on each worker's flattened gradient ``[n, d]``, its SPEC (``"topk:5%"``), or a function
                ``[d] -> [d]``; none by default. One with error feedback moves its state on; make one that carries a
                state once, since a SPEC would be a new one at each call. The memory of tracked estimators moves on as
                in `meta_gradient`, and not if the operator raises.
            aggregate: ``"mean"``, or a robust one: see `metamom.server.robust.robust_mean`.
            world: the processes that do this step together; one alone by default. Gradient, loss and metrics are then
                those of all of them, on all of them.
            measure: whether to measure ``bias_error``, for which several processes exchange whole gradients.

        Returns:
            ``(loss, metrics)``, see `Backward`.

        Raises:
            ValueError: as `meta_gradient`; by the operator; for processes that differ in weights or arguments.
            metamom.distributed.ProcessError: if another process is gone, or hangs. Any other failure of one process is
                raised by all.
        """
        world = as_world(world)
        if isinstance(bias, str):  # what it carries from step to step goes on
            bias = self.operators.setdefault(bias, as_operator(bias))
        weights = self.meta_parameters()
        sent = world.sent
        with world.together():
            self._check(batch)
            if world.size > 1:
                operator, shapes = as_operator(bias), [tuple(x.shape) for x in batch[:4]]
                what = f"bias={'none' if operator is None else operator.spec}, aggregate={aggregate}, measure={measure}"
                world.step(f"a step of workers={workers}, {what}, batches of {shapes}", weights.values())
            mine, done = world.workers(workers), 0
            sizes = [w.numel() for w in weights.values()]
            server = Aggregation(workers, bias, aggregate, sizes=sizes, world=world, measure=measure)
            found: list[tuple[Tensor, ...]] = []
            for rows, of_tasks in self._gradients(weights, batch, len(mine), world.rank * batch.num_tasks):
                try:
                    server.add(rows, mine[done : done + len(rows)])
                except NonFiniteError:
                    refuse_non_finite(batch, world.rank * batch.num_tasks)
                    raise
                done += len(rows)
                found.append(of_tasks)
            losses, predictions, *averages = map(_joined, zip(*found, strict=True))
            right = self._accuracy(predictions, batch.query_y)
        outcomes = world.gather(torch.stack([losses] if right is None else [losses, right.to(losses)]))
        losses, *shares = outcomes.transpose(0, 1).flatten(1)
        total, report = server.finish()
        norm = report["grad_norm"]
        if not (norm is not None and math.isfinite(norm) and all_finite(losses)):
            with world.together():
                refuse_non_finite(batch, world.rank * batch.num_tasks)
        for parameter, gradient in zip(weights.values(), unflatten(total, weights).values(), strict=True):
            deliver(parameter, gradient, server.operator, add=True)
        if self.memory is not None:
            assert batch.task_ids is not None
            everyones = [world.gather(u).flatten(0, 1) for u in averages]
            self._remember(world.gather(batch.task_ids).flatten(), everyones, total, losses)
        share = float(shares[0].mean()) if shares else None
        return Backward(losses.mean(), {"accuracy": share, **report, "sent_bytes": world.sent - sent})

    def _gradients(
        self, weights: Params, batch: TaskBatch, workers: int, number: int = 0
    ) -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
        """The workers' flattened meta-gradients, some ``[k, d]`` at a time in their order, as chunks give them.

        Each time with query losses ``[T]``, predictions and averages to keep, of the tasks of these workers. The
        ``number`` of the first task in the batch of all processes is what a random model draws by.
        """
        self._check(batch)
        workers = check_whole("the number of workers", workers, 1)
        per_worker = len(block(batch.num_tasks, 0, workers))
        parts = list(spans(batch.num_tasks, self._chunk_size(batch), per_worker))
        if isinstance(self._gradient, Compiled):
            if not self._tried:  # as it is, for a graph does not show what is wrong with it
                with torch.random.fork_rng(devices=[]):
                    self._one_task(batch)()
                self._tried = True
            self._gradient.expected = None if self._expected is None else self._expected * len(parts)
            if self._expected is not None:  # of calls beyond those told of nothing is known
                self._expected = self._expected - 1 if self._expected > 1 else None
        rows: Tensor | None = None
        held: list[tuple[Tensor, ...]] = []
        step = Step()
        for start, stop in parts:
            first, last = start // per_worker, -(-stop // per_worker)  # the workers whose tasks these are
            tasks = batch if len(parts) == 1 else batch.part(start, stop)
            with step.tasks(number + start, stop - start):
                found = self._gradient(weights, self._recalled(tasks), last - first, 1 / per_worker, *tasks[:4])
            of_tasks, grads = found[: 2 + self._averages], found[2 + self._averages :]
            flat = len(grads) == 1 and grads[0].dim() == 2  # a lone gradient of another shape is a weight's own
            chunk = grads[0] if flat else flatten(grads)
            rows = chunk if rows is None else rows + chunk
            held.append(of_tasks)
            if stop % per_worker == 0:
                yield rows, tuple(map(_joined, zip(*held, strict=True)))
                rows, held = None, []

    @property
    def _averages(self) -> int:
        """The number of tensors that tracked estimators average."""
        return 0 if self.memory is None else len(self.adapted)

    def _recalled(self, batch: TaskBatch) -> Params:
        """What is remembered of the tasks; nothing by estimators that track none."""
        return {} if self.memory is None else self.memory.recall(batch.task_ids, self._weights())

    def _remember(self, task_ids: Tensor | None, averages: list[Tensor], *results: Tensor) -> None:
        """Move the tasks' memory on, unless something would poison it."""
        if self.memory is not None and all(bool(x.isfinite().all()) for x in (*averages, *results)):
            self.memory.keep(task_ids, dict(zip(self.adapted, averages, strict=True)), self._weights())

    def _check(self, batch: TaskBatch) -> None:
        """Refuse a batch that the estimator cannot take."""
        check_batch(batch)
        check_support(batch, self.estimator, self.inner_steps, self.inner_batches)
        if self.memory is not None:
            distinct_ids(batch.task_ids)

    def _chunk_size(self, batch: TaskBatch) -> int | None:
        """The number of tasks at a time, measured where it is "auto"."""
        if self.chunk_size != "auto":
            return self.chunk_size
        key = (self._settings(), *((x.shape[1:], x.dtype, x.device) for x in batch[:4]))
        if key not in self._budgets:
            self._budgets[key] = tasks_within_budget(self._one_task(batch), batch.part(0, 1))
        return self._budgets[key]

    def _one_task(self, batch: TaskBatch) -> Callable[[], tuple[Tensor, ...]]:
        """The meta-gradient of the first task, to be computed as it is."""
        weights, one = self.meta_parameters(), batch.part(0, 1)
        return partial(self._gradient_of_chunk, weights, self._recalled(one), 1, 1.0, *one[:4])

    def _settings(self) -> tuple[Hashable, ...]:
        """What a compiled meta-gradient has built in, apart from shapes.

        Modules, hooks, buffers and frozen parameters are among it, as the objects that they are: the values of tensors
        may change. A module's own numbers (the rate of a dropout) and plain tensors are not.
        """
        device = next(self.model.parameters()).device.type
        around = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        fixed: list[Hashable] = [self.loss_fn, around, *self.step_sizes.fixed.values()]
        for module in self.modules():
            fixed += [module, module.training, *module._forward_hooks.values(), *module._forward_pre_hooks.values()]
            fixed += module._buffers.values()
            fixed += (p for p in module._parameters.values() if p is not None and not p.requires_grad)
        return self.inner_steps, self.estimator, self.inner_batches, self.autocast, *fixed

    def _gradient_of_chunk(
        self, weights: Params, memory: Params, workers: int, scale: float, *batch: Tensor
    ) -> tuple[Tensor, ...]:
        """Query losses, predictions, tracked averages, gradients of ``scale`` times the losses' sum by worker.

        Gradients are ``[workers, d]``, or ``[workers, *shape]`` each where a weight does not lie in memory as its
        indices go: a compiler would reorder it entry by entry in the middle of the sum over tasks.
        """
        totals: list[Tensor] = []
        with torch.enable_grad():
            rows = {name: w.detach().expand(workers, *w.shape).requires_grad_() for name, w in weights.items()}
            around = {} if is_tracing() else weights  # what the losses must depend on by way of the rows alone
            for term in self._cut(TaskBatch(*batch)):
                losses, predictions, adapted = self._episodes(rows, term, memory)
                check_one_tensor(predictions)
                with explained(self.model):
                    found = gradients(losses.sum() * (scale * term.weight), [*rows.values(), *around.values()])
                past = [name for name, grad in zip(around, found[len(rows) :], strict=True) if grad is not None]
                if past:
                    raise from_outside(past)
                own = dict(zip(rows, found[: len(rows)], strict=True))
                self._check_cut([name for name, grad in own.items() if grad is None], term.query_x, term.query_y)
                grads = [torch.zeros_like(rows[name]) if grad is None else grad for name, grad in own.items()]
                if not totals:
                    averages = [u.detach() for u in adapted.values()] if memory else []
                    first = losses.detach()[:: term.copies], predictions.detach()[:: term.copies], *averages
                totals = [a + b for a, b in zip(totals, grads, strict=True)] if totals else list(grads)
        if all(w.is_contiguous() for w in weights.values()):
            totals = [flatten(totals)]
        return *first, *totals

    def _estimated_losses(self, rows: Params, batch: TaskBatch) -> Tensor:
        """Query losses ``[T]`` of the first adaptation, with the derivatives of all of them, weighted."""
        memory = self._recalled(batch)
        each = [(term, self._episodes(rows, term, memory)[0].view(-1, term.copies)) for term in self._cut(batch)]
        first = each[0][1][:, 0]
        if len(each) == 1 and each[0][0].copies == 1:
            return first
        return straight_through(first, torch.stack([term.weight * losses.sum(1) for term, losses in each]).sum(0))

    def _cut(self, batch: TaskBatch) -> list[Adaptations]:
        return cut(batch, self.estimator, self.inner_steps, self.inner_batches)

    def _episodes(self, rows: Params, term: Adaptations, memory: Params) -> tuple[Tensor, Tensor, Params]:
        """Adapt and judge: query losses ``[T·c]``, predictions and adapted weights from workers' ``[n, *shape]``."""
        start = self._deal(rows, term.query_x.shape[0])
        *_, adapted = self._trajectory(start, term.steps, keep_graph=torch.is_grad_enabled())
        if memory:
            adapted = tracked(memory, adapted, lambda weights: self._step_from(weights, term.steps[0]))
        predictions = self._predictions(start, adapted, term.query_x)
        return self._losses(start, adapted, predictions, term.query_y), predictions, adapted

    def _step_from(self, weights: Params, batch: InnerBatch) -> Params:
        """An inner step from each task's own weights ``[T, *shape]``, without a graph."""
        own = {name: w for name, w in weights.items() if name in self.adapted}
        kept = {name: w for name, w in weights.items() if name not in own}
        *_, adapted = self._trajectory(Start(own, kept, {}, {}), [batch], keep_graph=False)
        return adapted

    def _trajectory(self, start: Start, steps: Iterable[InnerBatch], keep_graph: bool) -> Iterator[Params]:
        own = start.own
        yield own
        for batch in steps:
            with torch.enable_grad():
                at = own if keep_graph else {name: w.detach().requires_grad_() for name, w in own.items()}
                grads = self._inner_gradient(start, at, batch, keep_graph)
                self._check_cut([name for name, grad in grads.items() if grad is None], batch.x, batch.y)
                if keep_graph and self.estimator != "first-order":
                    flat = [name for name, grad in grads.items() if grad is not None and not grad.requires_grad]
                    self._check_constant(flat, batch)
                own = {
                    n: w if (g := grads[n]) is None else inner_step(w, self._step_size(n, start, w), g)
                    for n, w in at.items()
                }
            if not keep_graph:
                own = {name: w.detach() for name, w in own.items()}
            yield own

    def _step_size(self, name: str, start: Start, weight: Tensor) -> float | Tensor:
        return self.step_sizes.of(name, start.step_sizes, weight.dim())

    def _inner_gradient(
        self, start: Start, at: Params, batch: InnerBatch, keep_graph: bool
    ) -> dict[str, Tensor | None]:
        derivatives: Derivatives = "exact" if keep_graph and self.estimator != "first-order" else "none"
        if keep_graph and self.estimator == "hessian-free" and batch.hessian is not None:
            derivatives = "differences"

        def losses(x: Tensor, y: Tensor, draws: bool = True) -> Losses:
            def of(own: Params, others: Params) -> Tensor:
                kept, shared = ({name: others[name] for name in each} for each in (start.kept, start.shared))
                there = start._replace(kept=kept, shared=shared)
                return self._losses(there, own, self._predictions(there, own, x, draws), y)

            return of

        along = losses(batch.x, batch.y)
        hessian = None if batch.hessian is None else losses(*batch.hessian, draws=derivatives != "differences")
        with explained(self.model):
            precision = max(torch.finfo(self.autocast or w.dtype).eps for w in at.values())
            return inner_gradient(along, hessian, at, start.kept | start.shared, derivatives, precision)

    def _predictions(self, start: Start, own: Params, x: Tensor, draws: bool = True) -> Tensor:
        """Predictions ``[T, N, ...]`` on ``x: [T, N, ...]`` by parameters that have moved from ``start`` to ``own``.

        A model that ``draws`` does so for each task; where it must not it is an error.
        """
        out = self._run(self.model, start, own, x, draws, self.autocast)
        return out if self.autocast is None else out.to(x.dtype)

    def _losses(self, start: Start, own: Params, predictions: Tensor, y: Tensor) -> Tensor:
        """Losses ``[T]`` of predictions ``[T, N, ...]``, by the parameters that they were made with.

        A loss that is a module with parameters gets the tasks' own where it shares the model's.
        """
        if y.dtype == torch.uint8:  # labels to torch's losses, but not under vmap
            y = y.long()
        loss_fn, names = self._readings.watched(self.loss_fn), self._names_in_loss()

        def one_task(predictions: Tensor, y: Tensor) -> Tensor:
            loss = loss_fn(predictions, y)
            check_loss(loss)
            return loss

        with explained(self.model, "loss_fn"), targets_explained(predictions, y):
            if not names:
                losses: Tensor = torch.func.vmap(one_task)(predictions, y)
            else:
                losses = self._with_parameters(one_task, names, start, own, predictions, y)
        if losses.dim() != 1:
            raise ValueError(
                "loss_fn must return one number a task, as reduction='mean' does; "
                f"got shape {tuple(losses.shape[1:])} for each."
            )
        return losses

    def _with_parameters(
        self, loss: LossFn, names: Mapping[str, str], start: Start, own: Params, predictions: Tensor, y: Tensor
    ) -> Tensor:
        """The losses by a module whose parameters are among the tasks' weights, by the ``names`` of these."""
        assert isinstance(self.loss_fn, nn.Module)
        with alone(self.loss_fn):
            found = slots(self.loss_fn)

            def one_task(own: Params, kept: Params, predictions: Tensor, y: Tensor) -> Tensor:
                weights = {**start.shared, **kept, **own}
                with swapped(found, {name: weights[meta] for name, meta in names.items() if meta in weights}):
                    return loss(predictions, y)

            losses: Tensor = torch.func.vmap(one_task)(own, start.kept, predictions, y)
        return losses

    def _accuracy(self, predictions: Any, y: Tensor) -> Tensor | None:
        """Of ``[T, N, ...]``, whose loss was taken before."""
        if not isinstance(predictions, Tensor):  # something that the loss function takes apart
            return None
        return accuracy(predictions, y, self._readings.of(self.loss_fn, predictions, y))

    def _check_cut(self, missing: Sequence[str], x: Tensor, y: Tensor) -> None:
        """Refuse parameters without a gradient that the loss depends on; those that it does not are unused.

        Args:
            missing: names of meta-parameters.
            x: inputs of some tasks, the first of which is tried, ``[T, N, ...]``.
            y: their targets.
        """
        if is_tracing() or not (set(missing) - self._unused):
            return
        weights = {name: w.detach() for name, w in self._weights().items()}
        names = [name for name in missing if name in weights and name not in self._unused]
        step = Step()

        def loss(weights: Params) -> Tensor:
            start = self._deal({name: w.unsqueeze(0) for name, w in weights.items()}, 1)
            with step.tasks(0, 1):
                predictions = self._predictions(start, start.own, x[:1])
                return self._losses(start, start.own, predictions, y[:1])

        with torch.random.fork_rng(devices=[]):
            used = changes(loss, weights, names)
        if used:
            raise cut_off(used)
        self._unused.update(missing)

    def _check_constant(self, names: Sequence[str], batch: InnerBatch) -> None:
        """Refuse gradients without a derivative that depend on the weights; others are those of a linear loss.

        Args:
            names: of adapted parameters whose inner gradients have no graph.
            batch: of some tasks, the first of which is tried.
        """
        if is_tracing() or not (set(names) - self._constant):
            return
        weights = {name: w.detach() for name, w in self._weights().items()}
        one, step = InnerBatch(batch.x[:1], batch.y[:1]), Step()

        def gradient(name: str, weights: Params) -> Tensor:
            start = self._deal({name: w.unsqueeze(0) for name, w in weights.items()}, 1)
            with step.tasks(0, 1), torch.enable_grad():
                at = {name: w.detach().requires_grad_() for name, w in start.own.items()}
                found = self._inner_gradient(start, at, one, keep_graph=False)[name]
            assert found is not None
            return found

        with torch.random.fork_rng(devices=[]):
            cut = [name for name in names if changes(partial(gradient, name), weights, list(weights), nearby=True)]
        if cut:
            raise differentiable_once(cut)
        self._constant.update(names)

    def _weights(self) -> Params:
        """The trainable parameters of the model, and those of the loss that are not the model's too."""
        weights = named(self.model)
        names = self._names_in_loss()
        own = named(self.loss_fn) if isinstance(self.loss_fn, nn.Module) else {}
        for name, meta_name in names.items():
            if weights.setdefault(meta_name, own[name]) is not own[name]:
                raise ValueError(f"both the model and loss_fn have a parameter {meta_name!r}: rename the model's.")
        return {name: p for name, p in weights.items() if p.requires_grad}

    def _names_in_loss(self) -> dict[str, str]:
        """The parameters of a loss that is a module: their names there, and among the meta-parameters."""
        if not isinstance(self.loss_fn, nn.Module):
            return {}
        with alone(self.model, self.loss_fn):
            of_model = {id(p): name for name, p in self.model.named_parameters()}
            return {name: of_model.get(id(p), LOSS + name) for name, p in self.loss_fn.named_parameters()}

    def _one_row(self) -> Params:
        return {name: p.unsqueeze(0) for name, p in self.meta_parameters().items()}

    def _deal(self, rows: Params, num_tasks: int) -> Start:
        return deal(rows, num_tasks, self.adapted, self.step_sizes.learned())


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts))


def _whole(support_x: Tensor, support_y: Tensor, steps: int) -> list[InnerBatch]:
    """All the points in each step."""
    steps = check_whole("the number of inner steps", steps, 0)
    check_set("support", support_x, support_y, empty=steps == 0)
    return [InnerBatch(support_x, support_y)] * steps
