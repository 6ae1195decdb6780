"""Aggregate the workers' gradients into one: the server's half of a step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch._utils import _unflatten_dense_tensors

from metamom.bias import Bias, BiasOperator, Identity
from metamom.bias.coordinates import Sizes
from metamom.bias.function import without_state
from metamom.common.averaged import forget, note
from metamom.common.numbers import counted
from metamom.distributed import World, as_world
from metamom.server.part import Part, check_part
from metamom.server.robust import AnyAggregate, as_robust_mean
from metamom.server.workers import LocalMean, OwnWorkers, SharedWorkers


def flatten(grads: Iterable[Tensor]) -> Tensor:
    """Flatten each worker's gradient into one vector: tensors ``[n, *shape]``, in order, to ``[n, d]``."""
    return torch.cat([g.reshape(g.shape[0], g[0].numel()) for g in grads], dim=1)


def unflatten(vectors: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Split vectors ``[..., d]`` into tensors ``{name: [..., *shape]}`` with the shapes and dtypes of ``like``."""
    lead, dtype = vectors.shape[:-1], vectors.dtype
    if not lead and all(w.dtype is dtype for w in like.values()):  # one call for all
        pieces = _unflatten_dense_tensors(vectors, [*like.values()])  # type: ignore[no-untyped-call]
        return dict(zip(like, pieces, strict=True))
    pieces = vectors.split_with_sizes([w.numel() for w in like.values()], -1)
    return {name: piece.view(lead + w.shape).to(w.dtype) for (name, w), piece in zip(like.items(), pieces, strict=True)}


def deliver(parameter: Tensor, gradient: Tensor, operator: BiasOperator | None = None, *, add: bool = False) -> None:
    """Write a gradient to ``.grad``, or ``add`` it as a backward pass does, including hooks.

    It also notes for `CompositeMomentum` whether ``operator`` has averaged the gradient over steps.
    """
    if add:
        gradient = after_hooks(parameter, gradient)
    before = parameter.grad if add else None
    parameter.grad = gradient if before is None else before + gradient
    if operator is not None and operator.carries_momentum:
        note(parameter, operator.spec)
    elif before is None:
        forget([parameter])
    if add:
        for hook in list((parameter._post_accumulate_grad_hooks or {}).values()):
            hook(parameter)


def after_hooks(parameter: Tensor, gradient: Tensor) -> Tensor:
    """What the parameter's hooks (`torch.Tensor.register_hook`) make of its gradient."""
    for hook in (parameter._backward_hooks or {}).values():
        changed = hook(gradient)
        gradient = gradient if changed is None else changed
    return gradient


class Aggregation:
    """One step of the server: collects the workers' gradients, and returns ``1/n sum_i C(g_i)`` or a robust mean.

    With several processes, each adds the gradients of its own workers, and all agree (`World.agree`) before they
    `finish`. Compressing operators send messages. Otherwise processes all-reduce the sum, or gather all gradients if
    the aggregate is not a mean. If several processes share one worker, each adds the mean over its own tasks. The
    workers' gradients are then combined first, and sent uncompressed.

    Args:
        n: number of workers, over all processes.
        bias: the operator C on ``[n, d]``, its SPEC, or a function ``[d] -> [d]``; ``None`` for none. A SPEC must not
            name an operator with state from step to step: create such an operator once and pass it.
        how: see `metamom.server.robust_mean`; or a `metamom.server.RobustMean`, with its state and an
            attack. Its state changes in `finish`.
        sizes: the numbers of entries of the parameter tensors, for operators that act on each by itself, or their
            `metamom.bias.Layout`, for operators on matrices.
        world: the processes; one by default.
        measure: whether to measure the ``bias_error``. With several processes this exchanges uncompressed gradients.
        present: the numbers of the workers that are present in this step, ascending; all by default. The mean is that
            over the present ones, except for operators with which the server remembers an estimate of each worker's
            gradient (EF21, EF21-SGDM, EF21-SGD2M, Clip21, ...): it then averages all n estimates, those of the absent
            ones unchanged (EF21-PP).
        worker_weights: n positive weights, scaled to sum 1: the aggregate is ``sum_i w_i C(g_i)``, or
            ``n/m sum_i w_i C(g_i)`` over m present workers, whose expected value over uniform draws of them is the
            same. Equal by default. They need ``how="mean"``.

    Raises:
        ValueError: for an unknown ``how``, a name of one with state, or one that cannot combine n workers or trims
            none of them; for a SPEC that does not name an
            operator, or names one with state; for workers that cannot be split over the processes; for an operator
            that draws in the order of calls, with several processes; for workers or weights out of range, and for an
            operator that needs all workers (DIANA, MARINA, DASHA).

    Reference:
        arXiv 2403.00853, the server's averaging; Fatkhullin, Sokolov, Gorbunov, Li, Richtárik, "EF21 with Bells &
        Whistles", 2021, arXiv 2110.03294, for absent workers.
    """

    def __init__(
        self,
        n: int,
        bias: Bias = None,
        how: AnyAggregate = "mean",
        *,
        sizes: Sizes | None = None,
        world: World | None = None,
        measure: bool = True,
        present: Sequence[int] | None = None,
        worker_weights: Sequence[float] | None = None,
    ) -> None:
        world = as_world(world)
        operator = without_state(bias)
        self.operator = operator
        mine = world.workers(n)  # checks that they can be split
        self._missing = len(mine) if present is None else len({*mine}.intersection(present))
        self._workers: OwnWorkers | SharedWorkers | LocalMean
        if operator is None and how == "mean" and world.size == 1 and present is None and worker_weights is None:
            self._workers = LocalMean(n)
            return
        robust = as_robust_mean(how)
        robust.check(n)
        if robust.gathers:
            # a robust mean would hide one worker's NaN, so use an operator, which checks for it
            operator = operator or Identity()
        if world.size > 1 and operator is not None and not operator.separable:
            raise ValueError(
                f"{operator.spec} draws from a generator in the order of calls, which several processes do not share: "
                "make it with seed= in place of generator=."
            )
        part = Part.of(n, present, worker_weights, operator)
        check_part(part, robust, operator)
        self.operator = operator
        if n < world.size:
            self._workers = SharedWorkers(part, operator, robust, sizes, world)
        else:
            self._workers = OwnWorkers(part, operator, robust, sizes, world, measure)

    def add(self, rows: Tensor, workers: Sequence[int]) -> None:
        """Add gradients ``[k, d]`` of these workers, each present worker once; ``[0, d]`` if this process has none.

        Gradients can be added in several calls, and are usually not kept. They are kept if the operator has error
        feedback (its state is updated for all workers or none) or draws in the order of calls, or if the aggregate is
        not a mean. The operator's state does not change.

        Raises:
            ValueError: for another number of rows than of workers; for more workers than are left; from the operator.
        """
        count = len(workers)
        if len(rows) != count:
            raise ValueError(
                f"add() needs one row of gradients for each worker; got {len(rows)} rows, {count} workers."
            )
        if count > self._missing:
            raise ValueError(
                f"add() takes each present worker once; got {counted(count, 'worker')} when {self._missing} were left."
            )
        self._workers.add(rows, workers)
        self._missing -= count

    def transport(self, changes: Tensor, workers: Sequence[int]) -> None:
        """Change the momenta that these workers carry by ``[k, d]``, before their gradients are added.

        Raises:
            ValueError: if the operator carries none, or if processes share a worker.
        """
        self._workers.transport(changes, workers)

    def finish(self) -> tuple[Tensor, dict[str, float | int | None]]:
        """Compute the aggregate, and store the next state of the operator and of the robust mean.

        Returns:
            ``(g [d], report)``, the report with ``grad_norm``, ``bias_error`` and ``wire_bytes`` as
            `metamom.maml.Backward` explains them.

        Raises:
            ValueError: if gradients of workers of this process are missing.
        """
        if self._missing:
            raise ValueError(f"finish() needs the gradients of all present workers: {self._missing} are missing.")
        return self._workers.finish()


def aggregate(
    grads: Tensor,
    bias: Bias = None,
    how: AnyAggregate = "mean",
    *,
    workers: Sequence[int] | None = None,
    sizes: Sizes | None = None,
) -> tuple[Tensor, dict[str, float | int | None]]:
    """Aggregate the gradients of all workers in one process, see `Aggregation`.

    Args:
        grads: ``[n, d]``, each worker's flattened gradient.
        bias: as for an `Aggregation`.
        how: as for an `Aggregation`.
        workers: the workers' numbers, for random operators and error feedback; 0, 1, ... by default.
        sizes: as for an `Aggregation`.

    Returns:
        As `Aggregation.finish`.

    Raises:
        ValueError: as an `Aggregation`.
    """
    server = Aggregation(len(grads), bias, how, sizes=sizes)
    server.add(grads, range(len(grads)) if workers is None else workers)
    return server.finish()
