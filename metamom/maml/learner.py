"""MAML: meta-gradients through adaptation by gradient steps, for all tasks at once.

Adaptation itself and predictions are in `metamom.maml.adapting`.

Legend: T tasks, n workers with T/n tasks each, J inner steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from metamom.batch import TaskBatch
from metamom.bias import Bias, as_operator
from metamom.common.choices import Norm
from metamom.distributed import World, as_world
from metamom.maml.adapting import Adapting
from metamom.maml.estimators import Estimator, InnerBatches
from metamom.maml.gradient import OfTasks
from metamom.maml.loss_readings import LossFn as LossFn
from metamom.maml.misfits import asserts_explained
from metamom.maml.modes import differentiable_batch, out_of_inference
from metamom.maml.server_step import Backward as Backward
from metamom.maml.server_step import server_step
from metamom.maml.swapping import alone
from metamom.maml.task_weights import Params
from metamom.server.aggregate import after_hooks, unflatten
from metamom.server.robust import Aggregate


class MetaGradient(NamedTuple):
    """The result of `MAML.meta_gradient`: the workers' meta-gradients, and the query losses as from `MAML.losses`."""

    grads: Params
    losses: Tensor


class MAML(Adapting):
    """Model-agnostic meta-learning around any model, with exact second-order meta-gradients.

    A task's weights after J inner steps are ``u_0 = w, u_{j+1} = u_j - alpha * grad L_support(u_j)``; its meta-loss is
    ``L_query(u_J)``.

    Args:
        model: maps ``[N, ...]`` to predictions ``[N, ...]``. It runs with separate weights for each task, so it must
            not change its parameters or buffers in place. A tensor is passed as ``model(x)``, a dict of tensors as
            ``model(**x)``, a tuple or a list as ``model(*x)`` (to pass a dict as one argument, wrap it: ``(x,)``). It
            may return a tensor, or a tree of tensors that the loss takes.
        loss_fn: ``(predictions [N, ...], targets [N, ...]) -> 0-d loss``, such as `torch.nn.functional.mse_loss`;
            ``(predictions) -> loss`` for batches without targets. The parameters of a loss module are learned with the
            model's; inner steps do not move them. Give it other arguments by `functools.partial`, or, if they differ
            between tasks, in a dict of targets. On a batch from `metamom.pad`, it gets each task's own points; a loss
            with a parameter ``mask`` [N] (booleans, ``True`` for points that count) may get all.
        inner_lr: alpha > 0: one number, or a number or tensor for each adapted parameter. Leaf tensors that require a
            gradient are learned in place. Can be set later: ``learner.inner_lr = 0.1``.
        inner_steps: J >= 1.
        estimator: the meta-gradient estimator: ``"exact"``, ``"first-order"`` (FO-MAML), or another one listed in
            `metamom.maml.estimators`, which says what each computes and how many points it takes.
        inner_batches: ``"same"`` support points for every inner step, or ``"fresh"`` ones: J consecutive parts of the
            support set (of each half). A support set must divide into `support_parts` parts.
        tracking: b_u in (0, 1], the weight of a new inner step in the moving averages of ``"moml"``,
            ``"moml-coupled"`` and ``"scsc"``; 0.2 by default, 1 for no average.
        learn_inner_lr: learn alpha with the weights: ``True`` or ``"entry"`` (Meta-SGD), ``"tensor"``, ``"scalar"``.
        adapt: which parameters inner steps move: names of parameters or modules, or a predicate on a parameter's
            name; all trainable ones by default. ANIL is ``adapt=["head"]``: features that no inner step changes are
            computed once for all inner steps (docs/performance/index.md says for which models).
        chunk_size: compute at most this many tasks at a time, or ``None`` for all. This bounds memory and does not
            change the result (except for a compiled model's random draws). ``"auto"`` measures the memory of one task,
            once for each shape of batch, and uses about 256 MiB on a CPU, or half of the free memory on a GPU.
        vectorize: ``"vmap"`` runs model and loss on all tasks of a chunk at once. ``"loop"`` runs them task by task,
            with the same gradients to rounding. ``"auto"`` uses vmap until the model or the loss turns out not to work
            with it (recurrent layers, ``.item()`` or ``if`` on values, hooks), then warns once and loops. Of a batch
            from `metamom.pad`, a loop sees no padding, so ``"auto"`` also loops over those if the points of a task
            depend on each other (batch normalisation).
        compile: compile the whole meta-gradient, once for each batch shape, and again when the loss, a module, a
            hook, a buffer or a frozen parameter is replaced. Everything else that the model or loss reads (a dropout
            rate, a plain tensor) becomes a constant. ``"auto"`` compiles once it pays off (see `expect`). If
            compiling fails, it warns once and continues without. Batches from `metamom.pad` run without.
        autocast: dtype of the model's matrix products and convolutions: `torch.bfloat16`, accumulated in float32, or
            ``None``. Less accurate (docs/performance/memory.md), and faster only on hardware that multiplies in
            bfloat16.
        norm: what batch normalisation uses: ``"batch"``, the statistics of the current set (transductive, as in MAML);
            ``"frozen"``, the model's running statistics; or ``"support"``, for queries, the statistics of their task's
            support set at the adapted weights, so that predictions do not depend on the other queries (inductive). By
            default ``"frozen"`` for a model in ``eval()`` with running statistics, else ``"batch"``. Running statistics
            are never written.

    Random layers (dropout) are seeded from torch's generator at the start of a step and from the task's number in the
    batch, so their draws do not depend on chunks or processes. A compiled meta-gradient draws per chunk. Several
    threads may adapt, predict and evaluate with one learner, or with learners that share modules. No thread may call
    the bare model at the same time.

    Attributes:
        memory: the moving averages of tracked estimators, part of the ``state_dict``; ``None`` for the others.
        operators: the operators that were passed to `backward` as a SPEC, each created once. With error feedback,
            save their ``state_dict()`` with the learner's.

    Raises:
        ValueError: for an option that is out of range or not supported by the estimator, an unknown parameter name, a
            model that ``norm`` does not fit, or ``compile=True`` without a compiler. Its methods raise it for a model
            with a graph that is cut between a parameter and the loss, or one that reads weights other than the tasks'.

    Example:
        >>> from torch import nn
        >>> from torch.nn import functional as F
        >>> from metamom.tasks import Sinusoid
        >>> learner = MAML(nn.Linear(1, 1), F.mse_loss, inner_lr=0.01)
        >>> grads, losses = learner.meta_gradient(Sinusoid().sample(0, 4), workers=2)
        >>> grads["weight"].shape, losses.shape
        (torch.Size([2, 1, 1]), torch.Size([4]))

    Reference:
        Finn, Abbeel, Levine (2017), algorithm 1; the composite gradient of arXiv 2403.00853.
    """

    def like(
        self,
        *,
        estimator: Estimator | None = None,
        inner_batches: InnerBatches | None = None,
        norm: Norm | None = None,
        inner_lr: float | Tensor | Mapping[str, float | Tensor] | None = None,
    ) -> MAML:
        """A learner with the same model and loss, not compiled. Options that are ``None`` stay as they are.

        It shares its parameter tensors with this learner. ``chunk_size`` is ``"auto"`` if this learner has none.
        """
        with alone(self):  # another thread may be running the model
            other = MAML(
                self.model,
                self.loss_fn,
                inner_lr=0.01 if inner_lr is None else inner_lr,
                inner_steps=self.inner_steps,
                estimator=self.estimator if estimator is None else estimator,
                inner_batches=self.inner_batches if inner_batches is None else inner_batches,
                adapt=self.adapted,
                chunk_size="auto" if self.chunk_size is None else self.chunk_size,
                autocast=self.autocast,
                vectorize=self.vectorize,
                norm=self.norm if norm is None else norm,
            )
        other._run, other._vectorization = self._run, self._vectorization
        if inner_lr is None:
            other.step_sizes = self.step_sizes
        return other

    def losses(self, batch: TaskBatch) -> Tensor:
        """Each task's query loss after adaptation, ``[T]``.

        Differentiable in the meta-parameters if gradients are enabled; the derivative is the estimator's. The value
        comes from adapting on the estimator's first inner batches: half A for ``"independent"``, ``"hessian-free"``
        and ``"cross-fit"``, all points for the others (part by part if inner batches are fresh). For tracked
        estimators it is the loss at the moving averages that `meta_gradient` would use. Only `meta_gradient` and
        `backward` update these averages.

        Raises:
            ValueError: as `meta_gradient`.
        """
        with out_of_inference():
            return self._gradients.losses(self.meta_parameters(), differentiable_batch(batch))

    def meta_gradient(self, batch: TaskBatch, workers: int = 1) -> MetaGradient:
        """Compute each worker's composite meta-gradient, the mean over its own tasks.

        ``g_i = 1/m sum_t d L_query,t(u_J,t) / dw`` over the m = T/n tasks that `TaskBatch.split` deals to worker i.
        Tracked estimators update their moving averages, unless a loss or a gradient is not finite. Hooks of the
        parameters (`torch.Tensor.register_hook`) run on each worker's gradient; those of `backward` on their aggregate.

        Args:
            batch: T tasks.
            workers: n >= 1, must divide T.

        Returns:
            ``(grads, losses)``: ``{name: [n, *shape]}`` for every meta-parameter, and query losses ``[T]``; no graph
            is kept.

        Raises:
            ValueError: if n does not divide T, the support sets cannot be split into `support_parts` parts, the model
                cannot run with per-task weights, or a tracked estimator gets tasks without ids.
        """
        with out_of_inference():
            weights = self.meta_parameters()
            rows, of_tasks = zip(*self._gradients.by_worker(weights, differentiable_batch(batch), workers), strict=True)
            grads, tasks = torch.cat(rows), OfTasks.joined(of_tasks)
            self._plan().remember(batch.task_ids, tasks.averages, grads, tasks.losses)
            found = unflatten(grads, weights)
            for name, weight in weights.items():
                if weight._backward_hooks:
                    found[name] = torch.stack([after_hooks(weight, row) for row in found[name]])
            return MetaGradient(found, tasks.losses)

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
        check_finite: bool = True,
    ) -> Backward:
        """Add the aggregated, biased meta-gradient ``1/n sum_i C(g_i)`` to ``.grad``, as a backward pass does.

        Args:
            batch: T tasks; with several processes, this process's block (`metamom.distributed.World.sample`).
            workers: n >= 1 in total over all processes; must divide the total number of tasks.
            bias: the operator C on each worker's flattened gradient ``[n, d]``, its SPEC (``"topk:5%"``), or a function
                ``[d] -> [d]``; none by default. Error feedback and tracked estimators update their state unless the
                step fails.
            aggregate: ``"mean"``, or a robust mean: see `metamom.server.robust.robust_mean`.
            world: the processes that compute this step together; one by default. Every process gets the gradient,
                loss and metrics over all processes.
            measure: whether to measure ``bias_error``. With several processes this exchanges whole gradients.
            check_finite: refuse a loss or gradient that is not finite. ``False`` adds it to ``.grad`` as it is, unless
                an operator refuses it, for loops that skip such steps themselves (as `torch.amp.GradScaler` does).

        Returns:
            ``(loss, metrics)``, see `Backward`.

        Raises:
            metamom.DivergedError: if the loss or the gradient is not finite although the data is, saying whether the
                weights, the inner step or the step is too large. ``.grad`` does not change.
            metamom.maml.batch_checks.NonFiniteDataError: instead, if the data is not finite: which field and task.
            ValueError: as `meta_gradient`; from the operator; if processes differ in weights or arguments.
            metamom.distributed.ProcessError: if another process has died or hangs. All processes raise any other
                failure of one process.
        """
        if isinstance(bias, str):  # its state carries over from step to step
            bias = self.operators.setdefault(bias, as_operator(bias))
        with out_of_inference():
            return server_step(
                self._gradients,
                self.meta_parameters(),
                differentiable_batch(batch),
                workers=workers,
                bias=bias,
                aggregate=aggregate,
                world=as_world(world),
                measure=measure,
                check_finite=check_finite,
                accuracy=self._accuracy,
            )
