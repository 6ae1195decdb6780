"""Per-worker bias in anybody's training loop."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from metamom.aggregate import aggregate
from metamom.bias import Bias, as_operator


class BiasedAccumulator:
    """Takes gradients as a loop produces them, worker by worker, and leaves ``1/n sum_i C(g_i)`` in ``.grad``.

    Call `add` after each backward pass and `finish` before the optimizer's step. Without a worker, each `add` is a
    worker of its own; with one, the gradients of the same worker are averaged before the operator. The mean over the
    workers is taken here: the loop need not divide by the number of tasks.

    Args:
        params: the parameters, as an optimizer takes them (no groups). Those without ``requires_grad`` are passed
            over; one that stands there twice, shared between modules, counts once.
        bias: the operator C on each worker's flattened gradient, or a function ``[d] -> [d]``; ``None`` for the mean
            alone. Where a parameter got no gradient from a worker, that part of it is zero.
        workers: n; if given, `finish` insists on exactly so many.

    Raises:
        ValueError: for no trainable parameter, or ``workers`` below 1.
        TypeError: for a bias that is neither.

    Example:
        >>> from metamom import Clip
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> accumulator = BiasedAccumulator([w], bias=Clip(1.0), workers=2)
        >>> for target in ([3.0, 4.0], [0.0, 0.5]):
        ...     (w @ torch.tensor(target)).backward()
        ...     accumulator.add()
        >>> report = accumulator.finish()
        >>> w.grad
        tensor([0.3000, 0.6500])

    Reference:
        arXiv 2403.00853: operators act on each worker's whole gradient, before the server averages.
    """

    def __init__(self, params: Iterable[Tensor], bias: Bias = None, workers: int | None = None) -> None:
        self.params = list({id(p): p for p in params if p.requires_grad}.values())
        if not self.params:
            raise ValueError("BiasedAccumulator needs at least one parameter that requires a gradient; got none.")
        if workers is not None and workers < 1:
            raise ValueError(f"the number of workers must be >= 1; got {workers}.")
        self.bias = as_operator(bias)
        self.workers = workers
        self._sums: dict[int, list[Tensor]] = {}  # worker -> its gradients, summed
        self._counts: dict[int, int] = {}
        self._touched = [False] * len(self.params)
        self._numbered: bool | None = None  # whether this step's adds name their workers
        self._left: list[Tensor | None] = [None] * len(self.params)  # what the last `finish` left in .grad

    def add(self, worker: int | None = None) -> None:
        """Take what ``.grad`` holds as a gradient of ``worker``, and clear it.

        Args:
            worker: 0 <= worker < n; ``None`` for a new worker of its own.

        Raises:
            ValueError: if there is no gradient; if the last step's aggregate is still in ``.grad``; if only some
                calls name their worker; if a worker is out of range, or there are more than ``workers``.
            TypeError: for a sparse gradient.
        """
        if all(p.grad is None for p in self.params):
            raise ValueError("add() found no gradient: call it after loss.backward(), once for each backward pass.")
        if any(left is not None and p.grad is left for p, left in zip(self.params, self._left, strict=True)):
            raise ValueError(
                "add() found the aggregate of the last step still in .grad, with this step's gradient added to it: "
                "call optimizer.zero_grad() after each optimizer.step()."
            )
        if any(p.grad is not None and p.grad.layout is not torch.strided for p in self.params):
            raise TypeError("BiasedAccumulator needs dense gradients; got a sparse one: use sparse=False.")
        if self._numbered not in (None, worker is not None):
            raise ValueError("either every add() of a step names its worker or none does; got both.")
        index = len(self._sums) if worker is None else worker
        if index < 0 or (self.workers is not None and index >= self.workers):
            count = "the number of add() calls" if worker is None else "worker"
            raise ValueError(f"{count} does not fit workers={self.workers}: got worker {index} (counted from 0).")
        self._numbered = worker is not None
        sums = self._sums.setdefault(index, [torch.zeros_like(p) for p in self.params])
        self._counts[index] = self._counts.get(index, 0) + 1
        for number, (p, total) in enumerate(zip(self.params, sums, strict=True)):
            if p.grad is not None:
                total += p.grad.detach()
                self._touched[number] = True
                p.grad = None

    def finish(self) -> dict[str, float | int | None]:
        """Leave the aggregate in ``.grad``, and be ready for the next step.

        Returns:
            ``grad_norm``, ``bias_error`` and ``wire_bytes``, as `metamom.maml.Backward` explains them.

        Raises:
            ValueError: if there was no `add`; if a gradient came after the last one; if the workers are not exactly
                as many as asked for. Nothing is lost then: mend it and call again.
        """
        if any(p.grad is not None for p in self.params):
            raise ValueError(
                "finish() found a gradient in .grad that no add() took: call add() after each loss.backward(), and "
                "optimizer.zero_grad() after each optimizer.step()."
            )
        if not self._sums:
            raise ValueError("finish() has nothing to aggregate: call add() after each loss.backward().")
        if self.workers is not None and len(self._sums) != self.workers:
            missing = sorted(set(range(self.workers)) - set(self._sums))
            raise ValueError(
                f"finish() wanted gradients of exactly {self.workers} workers; got {len(self._sums)}, "
                f"none of worker(s) {', '.join(map(str, missing))}."
            )
        order = sorted(self._sums)
        means = [[total / self._counts[i] for total in self._sums[i]] for i in order]
        total, report = aggregate(
            {str(k): torch.stack(parts) for k, parts in enumerate(zip(*means, strict=True))}, self.bias
        )
        for number, p in enumerate(self.params):
            p.grad = total[str(number)] if self._touched[number] else None
        self._left = [p.grad for p in self.params]
        self._sums, self._counts, self._numbered = {}, {}, None
        self._touched = [False] * len(self.params)
        return report
