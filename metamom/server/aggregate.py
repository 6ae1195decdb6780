"""Aggregate the workers' gradients into one: the server's half of a step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch._utils import _unflatten_dense_tensors
from torch.linalg import vector_norm

from metamom.bias import Bias, BiasOperator, Identity
from metamom.bias.coordinates import Sizes
from metamom.bias.function import without_state
from metamom.common.averaged import forget, note
from metamom.distributed import World, as_world
from metamom.server.robust import Aggregate, check_aggregate, robust_mean


def flatten(grads: Iterable[Tensor]) -> Tensor:
    """Flatten each worker's gradient into one vector: tensors ``[n, *shape]``, in order, to ``[n, d]``."""
    return torch.cat([g.reshape(g.shape[0], g[0].numel()) for g in grads], dim=1)


def unflatten(vectors: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Split vectors ``[..., d]`` into tensors ``{name: [..., *shape]}`` with the shapes and dtypes of ``like``."""
    lead = vectors.shape[:-1]
    if not lead and all(w.dtype is vectors.dtype for w in like.values()):  # one call for all
        pieces = _unflatten_dense_tensors(vectors, list(like.values()))  # type: ignore[no-untyped-call]
        return dict(zip(like, pieces, strict=True))
    pieces = vectors.split_with_sizes([w.numel() for w in like.values()], -1)
    return {name: piece.view(lead + w.shape).to(w.dtype) for (name, w), piece in zip(like.items(), pieces, strict=True)}


def deliver(parameter: Tensor, gradient: Tensor, operator: BiasOperator | None = None, *, add: bool = False) -> None:
    """Write a gradient to ``.grad``, or ``add`` it as a backward pass does, including hooks.

    It also notes for `CompositeMomentum` whether ``operator`` has averaged the gradient over steps.
    """
    if add:
        for hook in (parameter._backward_hooks or {}).values():
            changed = hook(gradient)
            gradient = gradient if changed is None else changed
    before = parameter.grad if add else None
    parameter.grad = gradient if before is None else before + gradient
    if operator is not None and operator.carries_momentum:
        note(parameter, operator.spec)
    elif before is None:
        forget([parameter])
    if add:
        for hook in list((parameter._post_accumulate_grad_hooks or {}).values()):
            hook(parameter)


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
        how: see `metamom.server.robust.robust_mean`.
        sizes: the numbers of entries of the parameter tensors, for operators that act on each by itself.
        world: the processes; one by default.
        measure: whether to measure the ``bias_error``. With several processes this exchanges uncompressed gradients.

    Raises:
        ValueError: for an unknown ``how``, or one that trims none of n workers; for a SPEC that does not name an
            operator, or names one with state; for workers that cannot be split over the processes; for an operator
            that draws in the order of calls, with several processes.

    Reference:
        arXiv 2403.00853, the server's averaging.
    """

    def __init__(
        self,
        n: int,
        bias: Bias = None,
        how: Aggregate = "mean",
        *,
        sizes: Sizes | None = None,
        world: World | None = None,
        measure: bool = True,
    ) -> None:
        self.n = n
        self.how = how
        self.sizes = sizes
        self.world = as_world(world)
        self.operator = without_state(bias)
        check_aggregate(how, n)
        if how != "mean":
            # a robust mean would hide one worker's NaN, so use an operator, which checks for it
            self.operator = self.operator or Identity()
        if self.world.size > 1 and self.operator is not None and not self.operator.separable:
            raise ValueError(
                f"{self.operator.spec} draws from a generator in the order of calls, which several processes do not "
                "share: make it with seed= in place of generator=."
            )
        self._mine = len(self.world.workers(n))
        self._shared = n < self.world.size  # several processes share one worker
        self._measured = measure and self.operator is not None
        operator = self.operator
        self._streams = how == "mean" and (operator is None or (operator.separable and not operator.feeds_back))
        self._step = 0 if self.operator is None else self.operator.draw_step
        self._plain: Tensor | None = None  # sum of the gradients
        self._total: Tensor | None = None  # sum of the operator's outputs, or of the gradients without one
        self._rows = torch.empty(0)  # the operator's output for each worker, if the aggregate is not a mean
        self._held: list[Tensor] = []  # gradients that wait for the others
        self._whose: list[int] = []  # the workers that they belong to
        self._messages: list[Tensor] = []
        self._like = torch.empty(0)  # one worker's gradient, if messages are sent
        self._sent = 0  # bytes of all messages

    def add(self, rows: Tensor, workers: Sequence[int]) -> None:
        """Add gradients ``[k, d]`` of these workers, each worker once.

        Gradients can be added in several calls, and are usually not kept. They are kept if the operator has error
        feedback (its state is updated for all workers or none) or draws in the order of calls, or if the aggregate is
        not a mean.

        Raises:
            ValueError: from the operator.
        """
        if self._shared:
            whole = rows.new_zeros(self.n, rows.shape[1])
            whole[list(workers)] = rows * (self.n / self.world.size)
            self._total = whole if self._total is None else self._total + whole
            return
        if not self._streams:
            self._held.append(rows)
            self._whose += workers
            if len(self._whose) < self._mine:
                return
            rows, workers = torch.cat(self._held) if len(self._held) > 1 else rows, self._whose
            self._held = []
        if self._measured:
            self._plain = _sum(self._plain, rows)
        operator = self.operator
        if self.world.size > 1 and operator is not None:
            with operator.defer():  # until all processes have reached this point
                if operator.compresses:
                    self._messages += operator.send(rows, step=self._step, workers=workers, sizes=self.sizes)
                    self._like = rows[0]
                    return
                rows = operator(rows, step=self._step, workers=workers, sizes=self.sizes)
        elif operator is not None:
            rows = operator(rows, step=self._step, workers=workers, sizes=self.sizes)
        if self.how == "mean":
            self._total = _sum(self._total, rows)
        else:
            self._rows = rows

    def finish(self) -> tuple[Tensor, dict[str, float | int | None]]:
        """Compute the aggregate.

        Returns:
            ``(g [d], report)``, the report with ``grad_norm``, ``bias_error`` and ``wire_bytes`` as
            `metamom.maml.Backward` explains them.
        """
        if self._shared:
            return self._of_shared_workers()
        if self.operator is not None:
            self.operator.commit()
        if self._messages:
            total = self._of_messages()
        elif self.how == "mean":
            assert self._total is not None
            whole = self.world.reduce(self._total)
            total = self._from_server(lambda: whole / self.n, like=whole)
        else:
            rows = self.world.gather_to_server(self._rows)
            total = self._from_server(lambda: robust_mean(rows.flatten(0, 1), self.how), like=self._rows[0])
        error: float | None = 0.0
        if self.operator is not None:
            error = self._bias_error(total)
            self.operator.advance()
        return total, {
            "grad_norm": float(vector_norm(total)),
            "bias_error": error,
            "wire_bytes": self._wire_bytes(total),
        }

    def _of_shared_workers(self) -> tuple[Tensor, dict[str, float | int | None]]:
        """Aggregate shared workers: every process acts as the server of all workers."""
        assert self._total is not None
        return aggregate(self.world.all_reduce(self._total), self.operator, self.how, sizes=self.sizes)

    def _of_messages(self) -> Tensor:
        """Aggregate the workers' messages."""
        assert self.operator is not None
        operator, like, mine = self.operator, self._like, torch.cat(self._messages)
        lengths = torch.tensor([len(message) for message in self._messages])
        everyones = self.world.gather(lengths) if operator.varies else lengths.expand(self.world.size, -1)
        self._sent = int(everyones.sum())
        gathered = self.world.gather_to_server(nn.functional.pad(mine, (0, int(everyones.sum(1).max()) - len(mine))))

        def made() -> Tensor:
            messages = [
                message
                for row, each in zip(gathered, everyones.tolist(), strict=True)
                for message in row[: sum(each)].split(each)
            ]
            mean = self.how == "mean"
            whole = operator.receive(messages, len(like), like.dtype, sizes=self.sizes, each=not mean)
            return whole / self.n if mean else robust_mean(whole, self.how)

        return self._from_server(made, like)

    def _from_server(self, make: Callable[[], Tensor], like: Tensor) -> Tensor:
        """Call ``make`` on the server, and return its result (shape and dtype of ``like``) on every process."""
        world = self.world
        if world.size == 1 or world.server == "replicated":
            return make()
        with world.together():
            made = make() if world.first else torch.empty_like(like)
        return world.broadcast(made)

    def _bias_error(self, total: Tensor) -> float | None:
        if self._plain is None:
            return None
        mean = self.world.all_reduce(self._plain) / self.n
        norm = float(vector_norm(mean))
        return float(vector_norm(total - mean)) / norm if norm else 0.0

    def _wire_bytes(self, total: Tensor) -> int:
        """Bytes of the workers' messages, as sent or as they would be."""
        if self._messages:
            return self._sent
        d, size = len(total), total.element_size()
        return self.n * (d * size if self.operator is None else self.operator.wire_bytes(d, size, self.sizes))


def _sum(total: Tensor | None, rows: Tensor) -> Tensor:
    new = rows.sum(0) if len(rows) > 1 else rows[0]
    return new if total is None else total + new


def aggregate(
    grads: Tensor,
    bias: Bias = None,
    how: Aggregate = "mean",
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
