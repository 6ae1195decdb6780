"""How long a meta-iteration takes: learn2learn's loop, the same with `CompositeMomentum`, and metamom's `MAML`.

    python -m metamom.experiments.speed [--rounds 20] [--json]

All contenders of a row have the same model, the same task batch and second-order gradients, and take turns, so that a
machine that slows down slows all of them. Medians and quartiles of single iterations, after two to warm up.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from metamom.batch import TaskBatch
from metamom.experiments.learn2learn_loop import meta_iteration, tasks_of
from metamom.interop.learn2learn import import_learn2learn
from metamom.maml import MAML, LossFn
from metamom.nets import Conv4, SinusoidMLP
from metamom.optim import CompositeMomentum
from metamom.run_directory import environment
from metamom.tasks import Episodes, Sinusoid


class Row(NamedTuple):
    """What is timed: a model, a loss, a batch of tasks, the inner step size."""

    name: str
    model: torch.nn.Module
    loss_fn: LossFn
    batch: TaskBatch
    inner_lr: float


def rows() -> list[Row]:
    """The rows of the benchmark; images are noise, which costs as much as characters do."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(40, 1, 28, 28, generator=generator)
    episodes = Episodes(images, torch.arange(40) // 4, ways=5, shots=1, queries=1)
    return [
        Row(
            "sinusoid, MLP 40-40, 25 tasks, 10 + 10 points",
            SinusoidMLP(generator=generator),
            F.mse_loss,
            Sinusoid(10, 10).sample(0, 25),
            0.01,
        ),
        Row(
            "28x28 images, Conv4-64, 16 tasks, 5-way 1-shot",
            Conv4(5, generator=generator),
            F.cross_entropy,
            episodes.sample(0, 16),
            0.4,
        ),
    ]


def contenders(row: Row) -> dict[str, Callable[[], Any]]:
    """One iteration of each, from the same initial weights."""
    l2l = import_learn2learn()
    tasks = tasks_of(row.batch)

    def theirs(make: Callable[[Any], torch.optim.Optimizer]) -> Callable[[], Any]:
        learner = l2l.algorithms.MAML(copy.deepcopy(row.model), lr=row.inner_lr)
        optimizer = make(learner.parameters())
        return lambda: meta_iteration(learner, optimizer, tasks, row.loss_fn)

    def ours() -> Callable[[], Any]:
        learner = MAML(copy.deepcopy(row.model), row.loss_fn, inner_lr=row.inner_lr)
        optimizer = CompositeMomentum(learner.parameters(), lr=1e-3)

        def iteration() -> None:
            optimizer.zero_grad()
            learner.backward(row.batch)
            optimizer.step()

        return iteration

    return {
        "learn2learn loop, Adam": theirs(lambda p: torch.optim.Adam(p, lr=1e-3)),
        "learn2learn loop, CompositeMomentum": theirs(lambda p: CompositeMomentum(p, lr=1e-3)),
        "metamom MAML, CompositeMomentum": ours(),
    }


def measure(row: Row, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of single iterations, all contenders in turn, ``rounds`` times each."""
    iterations = contenders(row)
    times: dict[str, list[float]] = {name: [] for name in iterations}
    for turn in tqdm(range(rounds + 2), desc=row.name, leave=False, disable=None):
        for name, iteration in iterations.items():
            start = time.perf_counter()
            iteration()
            if turn >= 2:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Time a meta-iteration.", allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=20, help="timed iterations of each (default: 20)")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error(f"--rounds must be >= 1; got {arguments.rounds}")
    results = {row.name: measure(row, arguments.rounds) for row in rows()}
    if arguments.json:
        json.dump({"environment": environment(), "milliseconds": results}, sys.stdout)
        print()
        return
    env = environment()
    print(f"torch {env['torch']}, {env['threads']} threads, {arguments.rounds} iterations each; ms, median (quartiles)")
    for name, times in results.items():
        print(f"\n{name}")
        slowest = np.median(next(iter(times.values())))
        for contender, values in times.items():
            low, median, high = np.percentile(values, [25, 50, 75])
            print(f"  {contender:<38}{median:8.1f}  ({low:.1f} to {high:.1f}){slowest / median:8.1f} x")


if __name__ == "__main__":
    main()
