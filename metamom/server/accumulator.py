"""Per-worker bias in any training loop."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from metamom.bias import Bias, Layout, as_operator
from metamom.common.kinds import named_type
from metamom.common.sharded import is_sharded
from metamom.distributed import World, as_world
from metamom.server.aggregate import Aggregation, deliver, flatten, unflatten
from metamom.server.robust import AnyAggregate, as_robust_mean


@dataclass
class _Step:
    """What has come of a step so far.

    Attributes:
        touched: whether each parameter has got a gradient.
        sums: each worker's gradients, summed.
        counts: how many those are.
        numbered: whether adds name their workers; ``None`` before the first.
        arrived: whether there was a backward pass since the last add.
        mixed: whether one found an earlier one's gradient still in ``.grad``.
    """

    touched: list[bool]
    sums: dict[int, list[Tensor]] = field(default_factory=dict)
    counts: dict[int, int] = field(default_factory=dict)
    numbered: bool | None = None
    arrived: bool = False
    mixed: bool = False


class BiasedAccumulator:
    """Collects the workers' gradients in a training loop, and writes ``1/n sum_i C(g_i)`` to ``.grad``.

    Call `add` after each backward pass and `finish` before the optimizer's step. If `add` is called without a worker,
    each call counts as a new worker, starting with worker 0 in each step. If it is called with a worker, gradients of
    the same worker are averaged before the operator. Random operators draw by worker number, and error feedback keeps a
    state for each worker, so it needs to know which worker a gradient belongs to. `finish` averages over the workers,
    so the loop need not divide by the number of tasks.

    Args:
        params: the parameters, as for an optimizer (no groups). Parameters without ``requires_grad`` are skipped, and
            one that occurs twice (shared between modules) counts once.
        bias: the operator C on each worker's flattened gradient, its SPEC (``"topk:5%"``), or a function
            ``[d] -> [d]``; ``None`` for the plain mean. If a parameter gets no gradient from a worker, that part of
            the worker's gradient is zero.
        workers: n; if given, `finish` requires exactly n. With error feedback, pass it or name the workers.
        aggregate: ``"mean"``, or a robust mean of the ``C(g_i)``: see `metamom.server.robust_mean`. One with a state
            from step to step is a `metamom.server.RobustMean`; save its `state_dict` along with the others.
        world: the processes that share a step (`metamom.distributed.start`); one by default. Each adds the gradients of
            its own workers (``world.workers(n)``) and gets the aggregate of all. This needs ``workers``. Processes that
            share a worker must call `add` equally often.

    Raises:
        ValueError: without a trainable parameter, for ``workers`` below 1, or if they cannot be split over processes;
            for an unknown aggregate, the name of one with a state, or one that cannot combine n workers.
        TypeError: for any other kind of bias or aggregate, or for DTensors.

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

    def __init__(
        self,
        params: Iterable[Tensor],
        bias: Bias = None,
        workers: int | None = None,
        *,
        aggregate: AnyAggregate = "mean",
        world: World | None = None,
    ) -> None:
        if isinstance(params, Tensor):
            raise TypeError("BiasedAccumulator takes a list of parameters, such as model.parameters(); got one tensor.")
        if not isinstance(params, Iterable):
            raise TypeError(
                f"BiasedAccumulator takes a list of parameters, such as model.parameters(); got {params!r:.80}."
            )
        params = list(params)
        odd = next((p for p in params if not isinstance(p, Tensor)), None)
        if odd is not None:
            raise TypeError(f"BiasedAccumulator takes parameters (no names, no groups); got {named_type(odd)}.")
        if any(is_sharded(p) for p in params):
            raise TypeError(
                "BiasedAccumulator needs each worker's whole gradient; got DTensors, of which a process holds a part. "
                "Pass the parameters of a model that is not sharded; world= spreads the workers over processes."
            )
        self.params = list({id(p): p for p in params if p.requires_grad}.values())
        if not self.params:
            raise ValueError("BiasedAccumulator needs at least one parameter that requires a gradient; got none.")
        if workers is not None and (isinstance(workers, bool) or not isinstance(workers, int) or workers < 1):
            raise ValueError(f"the number of workers must be a whole number >= 1; got {workers}.")
        self.bias = as_operator(bias)
        self.aggregate = as_robust_mean(aggregate)
        if workers is not None:
            self.aggregate.check(workers)
        self.workers = workers
        self.world = as_world(world)
        if self.world.size > 1 and workers is None:
            raise ValueError(f"{self.world.size} processes share the workers of a step: pass workers=, their number.")
        self._mine = None if workers is None else self.world.workers(workers)
        hooks = [p.register_hook(_watch(weakref.ref(self), p)) for p in self.params]  # type: ignore[no-untyped-call]
        self._hooks = weakref.finalize(self, _remove, hooks)
        self._step = _Step(touched=[False] * len(self.params))

    def reset(self) -> None:
        """Discard the current step, for example after an error. ``.grad`` does not change: call ``zero_grad()`` too."""
        self._step = _Step(touched=[False] * len(self.params))

    def close(self) -> None:
        """Remove the hooks from the parameters; so does forgetting the accumulator. It cannot be used afterwards."""
        self._hooks()

    def __enter__(self) -> BiasedAccumulator:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def add(self, worker: int | None = None) -> None:
        """Take ``.grad`` as a gradient of ``worker``, and clear it.

        Args:
            worker: 0 <= worker < n; ``None`` for a new worker.

        Raises:
            ValueError: if there is no gradient; if a backward pass added to a gradient that no `add` had taken, such as
                the last step's; if only some calls name their worker; if none does, the operator has error feedback and
                the number of workers is unknown; if a worker is out of range, or there are more than ``workers``.
            TypeError: for a sparse gradient, or a worker that is not a whole number.
        """
        if not self._hooks.alive:
            raise ValueError("this accumulator has been closed; make another one over the parameters.")
        step = self._step
        if step.mixed:
            raise ValueError(
                "a backward pass found a gradient in .grad that no add() had taken, and added to it: call add() after "
                "each loss.backward() (with worker= for the parts of one worker), and optimizer.zero_grad() after each "
                "optimizer.step(). To go on, call zero_grad() and reset(), and do this step again."
            )
        if not any(p.grad is not None and (step.arrived or bool(p.grad.any())) for p in self.params):
            raise ValueError("add() found no gradient: call it after loss.backward(), once for each backward pass.")
        if any(p.grad is not None and p.grad.layout is not torch.strided for p in self.params):
            raise TypeError("BiasedAccumulator needs dense gradients; got a sparse one: use sparse=False.")
        if step.numbered not in (None, worker is not None):
            raise ValueError("either every add() of a step names its worker or none does; got both.")
        if worker is not None and (isinstance(worker, bool) or not isinstance(worker, int)):
            raise TypeError(f"worker is a whole number; got {worker!r}.")
        if worker is None and self.workers is None and self.bias is not None and self.bias.feeds_back:
            raise ValueError(
                f"{self.bias.spec} keeps a state for each worker and must know whose gradient this is: call "
                "add(worker=i), or make the BiasedAccumulator with workers=n, so that the i-th add() of each step is "
                "worker i's."
            )
        first = 0 if self._mine is None else self._mine.start
        index = first + len(step.sums) if worker is None else worker
        if index < 0:
            raise ValueError(f"worker must be >= 0; got {worker}.")
        if self._mine is not None and index not in self._mine:
            count = "the number of add() calls" if worker is None else "worker"
            whose = "" if self.world.size == 1 else f", of which this process has {[*self._mine]}"
            raise ValueError(
                f"{count} does not fit workers={self.workers}{whose}: got worker {index} (counted from 0)."
            )
        step.numbered = worker is not None
        step.arrived = False
        sums = step.sums.setdefault(index, [torch.zeros_like(p) for p in self.params])
        step.counts[index] = step.counts.get(index, 0) + 1
        for number, (p, total) in enumerate(zip(self.params, sums, strict=True)):
            if p.grad is not None:
                total += p.grad.detach()
                step.touched[number] = True
                p.grad = None

    @torch.no_grad()
    def finish(self) -> dict[str, float | int | None]:
        """Write the aggregate to ``.grad``, and start the next step.

        Returns:
            ``grad_norm``, ``bias_error`` and ``wire_bytes``, as `metamom.maml.Backward` explains them.

        Raises:
            ValueError: if there was no `add`; if a gradient came after the last one; if the number of workers is not
                ``workers``, or one that ``aggregate`` cannot combine. Nothing is lost: correct it and call again.
        """
        with self.world.together():
            if self.world.size > 1:
                assert self.workers is not None
                adds = "" if self.workers >= self.world.size else f", {sum(self._step.counts.values())} adds"
                spec, d = "none" if self.bias is None else self.bias.spec, sum(p.numel() for p in self.params)
                what = f"workers={self.workers}, bias={spec}, aggregate={self.aggregate.spec}, {d} entries{adds}"
                self.world.step(f"a step of {what}", self.params)
            order = self._order()
            means = [[total / self._step.counts[i] for total in self._step.sums[i]] for i in order]
            rows = flatten(torch.stack(parts) for parts in zip(*means, strict=True))
            sizes = Layout(p.shape for p in self.params)
            n = self.workers or len(order)
            server = Aggregation(n, self.bias, self.aggregate, sizes=sizes, world=self.world)
            server.add(rows, order)
        total, report = server.finish()
        grads = unflatten(total, {str(number): p for number, p in enumerate(self.params)})
        touched = self.world.all_reduce(torch.tensor(self._step.touched, dtype=torch.int64)).tolist()
        for number, p in enumerate(self.params):
            if touched[number]:
                deliver(p, grads[str(number)], server.operator)
            else:
                p.grad = None
        self.reset()
        return report

    def _order(self) -> list[int]:
        """The workers that have added gradients. Raises an error if any are missing."""
        if any(p.grad is not None and bool(p.grad.any()) for p in self.params):
            raise ValueError(
                "finish() found a gradient in .grad that no add() took: call add() after each loss.backward(), and "
                "optimizer.zero_grad() after each optimizer.step()."
            )
        sums = self._step.sums
        if not sums:
            raise ValueError("finish() has nothing to aggregate: call add() after each loss.backward().")
        if self._mine is not None and len(sums) != len(self._mine):
            missing = sorted(set(self._mine) - set(sums))
            raise ValueError(
                f"finish() wanted gradients of exactly {len(self._mine)} workers; got {len(sums)}, "
                f"none of worker(s) {', '.join(map(str, missing))}."
            )
        return sorted(sums)


def _remove(hooks: Iterable[RemovableHandle]) -> None:
    for hook in hooks:
        hook.remove()


def _watch(owner: weakref.ref[BiasedAccumulator], p: Tensor) -> Callable[[Tensor], None]:
    """A hook that runs before a backward pass adds to ``p.grad``."""

    def hook(gradient: Tensor) -> None:
        accumulator = owner()
        if accumulator is not None:
            accumulator._step.arrived = True
            accumulator._step.mixed |= p.grad is not None and bool(p.grad.any())

    return hook
