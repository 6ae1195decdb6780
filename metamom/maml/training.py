"""The meta-gradients of a learner, and their way into ``.grad``.

Legend: T tasks, n workers with T/n tasks each, J inner steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from metamom.batch import TaskBatch
from metamom.bias import Bias, BiasOperator, as_operator
from metamom.common.choices import FOLLOWING
from metamom.distributed import World, as_world
from metamom.maml.adapting import Adapting
from metamom.maml.checks.misfits import asserts_explained
from metamom.maml.chunk_results import OfTasks
from metamom.maml.modes import differentiable_batch, out_of_inference
from metamom.maml.steps.federation import Federation, kept_down_bias, kept_participation
from metamom.maml.steps.following import Following, check_alone, check_momentum_kind
from metamom.maml.steps.server_step import ALL_PRESENT, Exchange, mean_share, server_step
from metamom.maml.steps.server_step import Backward as Backward
from metamom.maml.steps.training_loss import with_gradient
from metamom.maml.task_weights import Params
from metamom.server.aggregate import after_hooks, deliver, unflatten
from metamom.server.down import DownBias
from metamom.server.participation import Participation
from metamom.server.robust import AnyAggregate
from metamom.server.workers import mean_of


class MetaGradient(NamedTuple):
    """The result of `MAML.meta_gradient`: the workers' meta-gradients, and the query losses as from `MAML.losses`."""

    grads: Params
    losses: Tensor


class Training(Adapting):
    """The part of `metamom.MAML` that computes meta-gradients."""

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

    @asserts_explained
    def backward(
        self,
        batch: TaskBatch,
        *,
        workers: int = 1,
        bias: Bias = None,
        aggregate: AnyAggregate = "mean",
        world: World | None = None,
        measure: bool = True,
        check_finite: bool = True,
        participation: Participation | float | None = None,
        worker_weights: Sequence[float] | None = None,
        local_steps: int = 1,
        local_lr: float | None = None,
        down_bias: DownBias | str | None = None,
        momentum: Optimizer | None = None,
    ) -> Backward:
        """Add the aggregated, biased meta-gradient ``1/n sum_i C(g_i)`` to ``.grad``, as a backward pass does.

        Args:
            batch: T tasks; with several processes, this process's block (`metamom.distributed.World.sample`).
            workers: n >= 1 in total over all processes; must divide the total number of tasks.
            bias: the operator C on each worker's flattened gradient ``[n, d]``, its SPEC (``"topk:5%"``), or a function
                ``[d] -> [d]``; none by default. Error feedback and tracked estimators update their state unless the
                step fails.
            aggregate: ``"mean"``, or a robust mean: see `metamom.server.robust_mean`. One with a state
                (centred clipping, bucketing) or an attack is a `metamom.server.RobustMean`, the same in each
                step.
            world: the processes that compute this step together; one by default. Every process gets the gradient,
                loss and metrics over all processes.
            measure: whether to measure ``bias_error``. With several processes this exchanges whole gradients.
            check_finite: refuse a loss or gradient that is not finite. ``False`` adds it to ``.grad`` as it is, unless
                an operator refuses it, for loops that skip such steps themselves (as `torch.amp.GradScaler` does).
            participation: the share of workers that are present in each step, drawn by a counter
                (`metamom.server.Participation`); all by default. The others compute and send nothing. A
                memoryless operator's mean is that over the present workers. Where the server remembers each worker's
                estimate (EF21, EF21-SGDM, EF21-SGD2M, Clip21, ...), it averages all of them, those of the absent ones
                unchanged (EF21-PP).
            worker_weights: a positive weight for each worker, scaled to sum 1; equal by default. They need the mean.
            local_steps: H >= 1, the meta-steps ``w_i <- w_i - local_lr * g_i(w_i)`` that each worker takes on tasks
                of its own, T/(n H) for each, before it sends the sum of its H gradients: the difference of its weights
                divided by ``local_lr``. With `metamom.CompositeMomentum` of the same step size and ``beta=1``, this is
                Per-FedAvg. From the second local step on, a compiled meta-gradient runs eagerly.
            local_lr: the step size of local steps, > 0; needed if there are several.
            down_bias: compress the server's message to the workers (`metamom.server.DownBias`, EF21-P), or the
                operator's SPEC: meta-gradients are then taken at the weights that workers have received.
            momentum: the `metamom.CompositeMomentum` that steps next. If its ``variant`` needs gradients elsewhere too,
                or a Hessian-vector product, they are computed from the same tasks. With ``bias="ef21-sgdm(ETA):A"``
                and ``beta=1``, the variant is that of the workers' momenta. Bytes count all messages. ``loss`` is that
                at w; of ``"igt"``, that at the extrapolated point.

        Returns:
            ``(loss, metrics)``, see `Backward`.

        Raises:
            metamom.DivergedError: if the loss or the gradient is not finite although the data is, saying whether the
                weights, the inner step or the step is too large. ``.grad`` does not change.
            metamom.maml.checks.batch_checks.NonFiniteDataError: instead, if the data is not finite: which field and
                task.
            ValueError: as `meta_gradient`; from the operator; if processes differ in weights or arguments.
            metamom.distributed.ProcessError: if another process has died or hangs. All processes raise any other
                failure of one process.
        """
        optimizer = None if momentum is None else check_momentum_kind(momentum)
        follows = optimizer is not None and optimizer.variant in FOLLOWING
        plain = bias is None and world is None and isinstance(aggregate, str) and aggregate == "mean"
        everyone = participation is None and worker_weights is None and down_bias is None
        if plain and everyone and local_lr is None and type(local_steps) is int and local_steps == 1 and not follows:
            again = self._again(batch, workers)
            if again is not None:
                return again
        federation = Federation(
            kept_participation(participation, self.federated),
            worker_weights,
            local_steps,
            local_lr,
            kept_down_bias(down_bias, self.federated),
        )
        options: dict[str, Any] = {"aggregate": aggregate, "measure": measure, "check_finite": check_finite}
        if optimizer is None or not follows:
            return self._server_step(batch, workers=workers, bias=bias, world=world, federation=federation, **options)
        check_alone(optimizer.variant, federation, aggregate)
        with out_of_inference():
            following = Following(
                self._gradients,
                self.meta_parameters(),
                differentiable_batch(batch),
                workers,
                as_operator(self._kept(bias)),
                as_world(world),
                partial(self._at_one_point, batch, workers=workers, bias=bias, world=world, **options),
            )
            done = following.backward(optimizer)
        self._count()
        return done

    @asserts_explained
    def training_loss(
        self,
        batch: TaskBatch,
        *,
        workers: int = 1,
        bias: Bias = None,
        aggregate: AnyAggregate = "mean",
        check_finite: bool = True,
    ) -> Tensor:
        """The mean query loss over the tasks, a 0-d tensor; its ``backward()`` gives what `backward` adds to ``.grad``.

        For training loops that call ``loss.backward()`` themselves (PyTorch's `DistributedDataParallel`, Lightning,
        Accelerate): ``learner(batch)`` is the same, so the learner can be wrapped. The gradient is computed in this
        call, in chunks and compiled as the learner says, and its graph is not kept: it can be differentiated once. The
        loss may be scaled, or be a part of another loss. Without gradients (`torch.no_grad`), only the loss is
        computed. With several processes, each one passes its own tasks, and the trainer averages the gradients.

        Args:
            batch: T tasks.
            workers: as of `backward`, within this process.
            bias: as of `backward`; its state changes in this call. To compress what the processes of a
                `DistributedDataParallel` model send each other, see `metamom.interop.ddp`.
            aggregate: as of `backward`.
            check_finite: as of `backward`.

        Raises:
            metamom.DivergedError: as `backward`.
            metamom.maml.checks.batch_checks.NonFiniteDataError: as `backward`.
            ValueError: as `backward`.

        Example:
            >>> import metamom
            >>> from torch import nn
            >>> from torch.nn import functional as F
            >>> from metamom.tasks import Sinusoid
            >>> learner = metamom.MAML(nn.Linear(1, 1), F.mse_loss)
            >>> optimizer = torch.optim.Adam(learner.parameters())
            >>> learner.training_loss(Sinusoid().sample(0, 4)).backward()
            >>> optimizer.step()
        """
        weights = self.meta_parameters()
        if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            return self.losses(batch).mean()
        taken: list[tuple[Params, BiasOperator | None]] = []
        step = self._server_step(
            batch,
            workers=workers,
            bias=bias,
            aggregate=aggregate,
            world=None,
            measure=False,
            check_finite=check_finite,
            exchange=Exchange(take=lambda gradient, operator: taken.append((gradient, operator))),
        )
        [(gradient, operator)] = taken
        return with_gradient(step.loss, gradient, weights, operator)

    def forward(self, batch: TaskBatch, **options: Any) -> Tensor:
        """`training_loss`."""
        return self.training_loss(batch, **options)

    def _again(self, batch: TaskBatch, workers: int) -> Backward | None:
        """A `_server_step` that is computed as the last one was, without its checks.

        ``None`` if more than values has changed, and if the result is not finite: `_server_step` then says why.
        """
        found = self._gradients.again(batch, workers)
        if found is None:
            return None
        total, report = mean_of(found.rows)
        loss, norm = found.losses.mean(), report["grad_norm"]
        if norm is None or not (math.isfinite(norm) and math.isfinite(float(loss))):
            return None
        for parameter, gradient in zip(found.weights.values(), unflatten(total, found.weights).values(), strict=True):
            deliver(parameter, gradient, add=True)
        right = self._accuracy(found.predictions, batch.query_y)
        shares = [] if right is None else [right.to(found.losses)]
        return Backward(loss, {"accuracy": mean_share(shares), **report, "sent_bytes": 0})

    def _server_step(self, batch: TaskBatch, *, federation: Federation = ALL_PRESENT, **options: Any) -> Backward:
        weights = self.meta_parameters()
        with out_of_inference(), federation.seen(weights, options["workers"]) as report:
            done = self._at_one_point(batch, weights=weights, federation=federation, **options)
            done.metrics.update(report)
        self._count()
        return done

    def _at_one_point(
        self, batch: TaskBatch, *, bias: Bias, world: World | None, weights: Params | None = None, **options: Any
    ) -> Backward:
        """A step of the server at the current weights, the meta-parameters, which does not count as an iteration."""
        with out_of_inference():
            return server_step(
                self._gradients,
                self.meta_parameters() if weights is None else weights,
                differentiable_batch(batch),
                bias=self._kept(bias),
                world=as_world(world),
                accuracy=self._accuracy,
                **options,
            )

    def _kept(self, bias: Bias) -> Bias:
        """The operator of a SPEC, made once, since its state carries over from step to step; anything else as it is."""
        return self.operators.setdefault(bias, as_operator(bias)) if isinstance(bias, str) else bias

    def _count(self) -> None:
        if self.annealing is not None:
            self.annealing.count()
