"""The cost of a step over many processes: bytes by the operators' own count, seconds by latency and bandwidth.

    step = compute + encode + exchange + decode,    exchange = hops * latency + path / bandwidth

Legend: n processes; D bytes of a gradient, m of a message. Collectives go the way gloo sends them: in a ring
(all-reduce, all-gather, reduce), straight to process 0 (gather), or along a binary tree (broadcast). A process sends
and receives at once, each at the link's bandwidth; nothing overlaps computation. With ``tree=True`` the first three
use recursive halving and doubling, as other libraries do: the same bytes in only 2 log2 n hops.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from metamom.distributed import Server

AGREEMENT = 24  # bytes that each process sends in `World.agree`


class Exchange(NamedTuple):
    """The cost of collectives; costs add up.

    Attributes:
        hops: messages one after the other, each of which takes a latency.
        path: bytes one after the other through the busiest link.
        sent: bytes of all processes together, as `metamom.distributed.World.sent` counts them.
    """

    hops: float = 0.0
    path: float = 0.0
    sent: int = 0

    def __add__(self, other: Exchange) -> Exchange:  # type: ignore[override]
        return Exchange(self.hops + other.hops, self.path + other.path, self.sent + other.sent)

    def seconds(self, link: Link) -> float:
        """The time on such a link."""
        return self.hops * link.latency + self.path / link.bandwidth


class Link(NamedTuple):
    """Seconds per message, on top of its bytes, and bytes per second."""

    latency: float
    bandwidth: float


class Line(NamedTuple):
    """``fixed + each * x``: seconds as a function of an amount x."""

    fixed: float
    each: float

    def __call__(self, x: float) -> float:
        return self.fixed + self.each * x


class Kind(NamedTuple):
    """An operator on gradients of a fixed length, as the model sees it.

    Attributes:
        message: bytes that one worker sends, by `BiasOperator.wire_bytes`.
        dense: whether messages are whole gradients, which an all-reduce can sum.
        apply: seconds for one worker's gradient if nothing is sent.
        encode: seconds for one worker's message.
        decode: seconds to decode messages, by their number.
    """

    message: int
    dense: bool
    apply: float = 0.0
    encode: float = 0.0
    decode: Line = Line(0.0, 0.0)


class Plan(NamedTuple):
    """A step of n processes.

    Attributes:
        processes: n >= 1.
        workers: of each process, >= 1.
        tasks: of each process.
        gradient: bytes D of a gradient.
        outcome: bytes that each process reports on its tasks: losses, and correct predictions.
        server: which processes aggregate.
    """

    processes: int
    workers: int
    tasks: int
    gradient: int
    outcome: int
    server: Server = "replicated"


class Seconds(NamedTuple):
    """Seconds of a step, by part."""

    compute: float
    encode: float
    exchange: float
    decode: float

    @property
    def total(self) -> float:
        """The sum of all parts."""
        return sum(self)


def all_reduce(n: int, size: float, *, tree: bool = False) -> Exchange:
    """Sum ``size`` bytes: reduce-scatter and all-gather, ``2 (n-1)/n size`` through each link."""
    if n == 1:
        return Exchange()
    return Exchange(2 * _hops(n, tree), 2 * (n - 1) / n * size, int(2 * (n - 1) * size))


def all_gather(n: int, size: float, *, tree: bool = False) -> Exchange:
    """Send every process's ``size`` bytes to all: ``(n-1) size`` through each link, which grows with n."""
    if n == 1:
        return Exchange()
    return Exchange(_hops(n, tree), (n - 1) * size, int(n * (n - 1) * size))


def gather(n: int, size: float) -> Exchange:
    """Send every process's ``size`` bytes to process 0, over its one link."""
    if n == 1:
        return Exchange()
    return Exchange(1, (n - 1) * size, int((n - 1) * size))


def broadcast(n: int, size: float) -> Exchange:
    """Send ``size`` bytes of process 0 to all, along a tree."""
    if n == 1:
        return Exchange()
    depth = math.ceil(math.log2(n))
    return Exchange(depth, depth * size, int((n - 1) * size))


def reduce(n: int, size: float, *, tree: bool = False) -> Exchange:
    """Send the sum of ``size`` bytes to process 0: reduce-scatter and gather; `World` counts ``(n-1) size``."""
    if n == 1:
        return Exchange()
    return Exchange(_hops(n, tree) + 1, 2 * (n - 1) / n * size, int((n - 1) * size))


def _hops(n: int, tree: bool) -> float:
    return math.ceil(math.log2(n)) if tree else n - 1


def exchange(plan: Plan, kind: Kind, *, tree: bool = False) -> Exchange:
    """Everything that processes send each other in a step of `MAML.backward`."""
    n = plan.processes
    agreement = all_gather(n, AGREEMENT, tree=tree)
    total = agreement + all_gather(n, plan.outcome, tree=tree)
    if plan.server == "replicated":
        if kind.dense:
            return total + all_reduce(n, plan.gradient, tree=tree)
        return total + all_gather(n, plan.workers * kind.message, tree=tree)
    to_server = reduce(n, plan.gradient, tree=tree) if kind.dense else gather(n, plan.workers * kind.message)
    return total + to_server + agreement + broadcast(n, plan.gradient)


def seconds(
    plan: Plan, kind: Kind, compute: Line, link: Link, *, cores: float = math.inf, tree: bool = False
) -> Seconds:
    """The time of a step.

    Args:
        plan: the step.
        kind: the operator.
        compute: a process's seconds by its number of tasks.
        link: the link between processes.
        cores: the cores that all processes share if they are on one machine; more processes than cores take turns.
        tree: the collectives' algorithm: see above.

    Example:
        >>> plan = Plan(processes=1, workers=1, tasks=4, gradient=400, outcome=16)
        >>> seconds(plan, Kind(400, dense=True), Line(0.001, 0.002), Link(1e-4, 1e9)).total
        0.009000000000000001
    """
    busy = max(1.0, plan.processes / cores)
    alone = plan.processes == 1
    encode = plan.workers * (kind.apply if alone else kind.encode)
    server = busy if plan.server == "replicated" else 1.0  # processes that decode at the same time
    return Seconds(
        compute=busy * compute(plan.tasks),
        encode=busy * encode,
        exchange=exchange(plan, kind, tree=tree).seconds(link),
        decode=0.0 if alone or kind.dense else server * kind.decode(plan.processes * plan.workers),
    )


def wire_bytes(plan: Plan, kind: Kind) -> int:
    """Bytes of all workers' messages in a step, as `MAML.backward` logs them."""
    return plan.processes * plan.workers * kind.message


def bytes_of_a_process(plan: Plan, kind: Kind) -> float:
    """Bytes that a process sends in a step, on average over processes; it receives as many."""
    return exchange(plan, kind).sent / plan.processes
