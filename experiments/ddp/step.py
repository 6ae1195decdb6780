"""Time steps of models in DDP on the processes that torchrun has started.

    torchrun --nproc-per-node 2 -m metamom.experiments.ddp.step PLAN.json FOUND.json

PLAN.json holds the model's ``width`` and the number of ``rounds``. Hooks take turns, each with a model of its own, so
that a machine that slows down slows all of them; process 0 writes the measurements.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from metamom.common.allocator import keep_freed_memory
from metamom.distributed import World, start
from metamom.interop import ddp

INPUTS, CLASSES, EXAMPLES = 784, 10, 32
WARM_UP = 3  # steps: DDP makes its buckets again, and PowerSGD begins to compress
Counter = Callable[[int], float]  # the bytes that all processes have sent each other after so many steps


def mlp(width: int) -> nn.Module:
    """A network with three hidden layers."""
    sizes = (INPUTS, width, width, width)
    layers = [layer for i, o in pairwise(sizes) for layer in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(width, CLASSES))


def _all_reduced(model: DistributedDataParallel, world: World, element_size: int) -> Counter:
    """What all-reduces of the gradient must send."""
    entries = sum(p.numel() for p in model.parameters())
    return lambda steps: steps * 2 * (world.size - 1) * entries * element_size


def none(model: DistributedDataParallel, world: World) -> Counter:
    """DDP's own all-reduce."""
    return _all_reduced(model, world, 4)


def fp16(model: DistributedDataParallel, world: World) -> Counter:
    """Torch's all-reduce of 16 bits."""
    model.register_comm_hook(None, default_hooks.fp16_compress_hook)
    return _all_reduced(model, world, 2)


def power_sgd(model: DistributedDataParallel, world: World) -> Counter:
    """Torch's PowerSGD of rank 1, with its error feedback."""
    state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=1, start_powerSGD_iter=2)

    def one_by_one(state, bucket):  # type: ignore[no-untyped-def]
        """The hook starts further all-reduces when one ends; gloo may then mix up those of two buckets, and hang."""
        done = powerSGD_hook.powerSGD_hook(state, bucket)
        done.wait()
        return done

    model.register_comm_hook(state, one_by_one)
    return lambda _: 2 * (world.size - 1) * 4 * state.total_numel_after_compression


def ours(
    bias: str | None, scope: ddp.Scope = "model", dtype: torch.dtype | None = None
) -> Callable[[DistributedDataParallel, World], Counter]:
    """Ours, with these arguments."""

    def registered(model: DistributedDataParallel, world: World) -> Counter:
        reduction = ddp.register(model, bias, scope, dtype=dtype)
        return lambda _: reduction.world.sent

    return registered


HOOKS: dict[str, Callable[[DistributedDataParallel, World], Counter]] = {
    "no hook": none,
    "`fp16_compress_hook`": fp16,
    "`powerSGD_hook`, rank 1": power_sgd,
    "ours: `None`": ours(None),
    "`dtype=torch.float16`": ours(None, dtype=torch.float16),
    "`clip:1`": ours("clip:1"),
    "`topk:1%`": ours("topk:1%"),
    "`ef21:topk:1%`": ours("ef21:topk:1%"),
    '`ef21:topk:1%`, `"bucket"`': ours("ef21:topk:1%", "bucket"),
    "`randk:1%`": ours("randk:1%"),
    "`sign`": ours("sign"),
}


class Timed:
    """A model with a hook, and the steps done."""

    def __init__(self, hook: Callable[[DistributedDataParallel, World], Counter], width: int, world: World) -> None:
        self.model = DistributedDataParallel(mlp(width))  # which sends process 0's weights to all
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3)
        self.count, self.world = hook(self.model, world), world
        self.seconds: list[float] = []
        self.sent: list[float] = []

    def step(self, x: Tensor, y: Tensor) -> None:
        """A step, once all processes have arrived, until all are done."""
        self.optimizer.zero_grad()
        before = self.count(len(self.seconds))
        self.world.agree()
        begin = time.perf_counter()
        cross_entropy(self.model(x), y).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.world.agree()
        self.seconds.append(time.perf_counter() - begin)
        self.sent.append(self.count(len(self.seconds)) - before)


def main(words: Sequence[str] | None = None) -> None:
    """Read a plan, measure, and write the results."""
    said, found = map(Path, sys.argv[1:] if words is None else words)
    keep_freed_memory()
    plan = json.loads(said.read_text(encoding="utf-8"))
    with start() as world:
        all_timed = {name: Timed(hook, plan["width"], world) for name, hook in HOOKS.items()}
        x = torch.randn(EXAMPLES, INPUTS, generator=torch.Generator().manual_seed(world.rank))
        y = torch.arange(EXAMPLES) % CLASSES
        rounds = tqdm(range(WARM_UP + plan["rounds"]), unit="round", leave=False, disable=None if world.first else True)
        for number in rounds:
            names = [*all_timed]
            first = number % len(names)
            for name in names[first:] + names[:first]:
                all_timed[name].step(x, y)
        if world.first:
            parameters = sum(p.numel() for p in mlp(plan["width"]).parameters())
            hooks = {
                name: {"seconds": timed.seconds[WARM_UP:], "sent_bytes": timed.sent[WARM_UP:]}
                for name, timed in all_timed.items()
            }
            found.write_text(json.dumps({"parameters": parameters, "hooks": hooks}), encoding="utf-8")


if __name__ == "__main__":
    main()
