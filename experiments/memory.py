"""How much memory meta-gradients take: over thousands of iterations, and for a meta-batch of 1,000 tasks.

    python -m metamom.experiments.memory [--iterations 2000] [--tasks 1000] [--json]

Each line is measured in a process of its own, by the largest resident set that the system saw: a leak of any kind
raises it from one quarter of the iterations to the next.
"""

from __future__ import annotations

import argparse
import json
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
from torch.nn import functional as F
from tqdm import tqdm

from metamom.compiled import CompileMode
from metamom.experiments.peak import peak_mib
from metamom.maml import MAML
from metamom.nets import Conv4, SinusoidMLP
from metamom.optim import CompositeMomentum
from metamom.run_directory import environment
from metamom.tasks import Episodes, Sinusoid
from metamom.tasks.family import TaskFamily

QUARTERS = 4


def flatness(model: str, compile: CompileMode, iterations: int) -> list[float]:
    """Peak MiB after each quarter of ``iterations`` iterations, each with tasks of its own."""
    generator = torch.Generator().manual_seed(0)
    if model == "sinusoid":
        learner = MAML(SinusoidMLP(generator=generator), F.mse_loss, compile=compile)
        tasks: TaskFamily = Sinusoid()
    else:
        learner = MAML(Conv4(5, hidden=16, generator=generator), F.cross_entropy, inner_lr=0.4, compile=compile)
        tasks = _episodes()
    optimizer = CompositeMomentum(learner.parameters(), lr=1e-3)
    peaks = []
    for step in tqdm(range(iterations), desc=f"{model}, {_mode(compile)}", leave=False, disable=None):
        optimizer.zero_grad()
        learner.backward(tasks.sample(step, 8))
        optimizer.step()
        if (step + 1) % (iterations // QUARTERS) == 0:
            peaks.append(peak_mib())
    return peaks


def large_batch(tasks: int, chunk_size: Any, compile: CompileMode = False) -> list[float]:
    """Peak MiB before and after one meta-gradient of Conv4-64 over ``tasks`` 5-way 1-shot tasks."""
    learner = MAML(Conv4(5), F.cross_entropy, inner_lr=0.4, chunk_size=chunk_size, compile=compile)
    batch = _episodes().sample(0, tasks)
    before = peak_mib()
    learner.backward(batch)
    return [before, peak_mib()]


def _alone(function: Any, *args: Any) -> list[float]:
    """The function's value, computed in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        peaks: list[float] = pool.submit(function, *args).result()
    return peaks


def _episodes() -> Episodes:
    images = torch.rand(40, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    return Episodes(images, torch.arange(40) // 4, ways=5, shots=1, queries=1)


def _mode(compile: CompileMode) -> str:
    return "compiled" if compile else "eager"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Measure the memory of meta-gradients.", allow_abbrev=False)
    parser.add_argument("--iterations", type=int, default=2000, help="of the long runs (default: 2000)")
    parser.add_argument("--tasks", type=int, default=1000, help="of the large meta-batch (default: 1000)")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    arguments = parser.parse_args()
    if arguments.iterations < QUARTERS or arguments.tasks < 1:
        parser.error(f"--iterations must be >= {QUARTERS} and --tasks >= 1")
    n = arguments.iterations
    long_runs = {f"{m}, {_mode(c)}": (m, c, n) for m in ("sinusoid", "Conv4-16") for c in (False, True)}
    batches = {
        "chunk_size=None": (min(arguments.tasks, 64), None),
        'chunk_size="auto"': (arguments.tasks, "auto"),
        'chunk_size="auto", compiled': (arguments.tasks, "auto", True),
    }
    flat = {name: _alone(flatness, *given) for name, given in long_runs.items()}
    large = {f"{given[0]} tasks, {name}": _alone(large_batch, *given) for name, given in batches.items()}
    if arguments.json:
        json.dump({"environment": environment(), "iterations": n, "flat": flat, "large": large}, sys.stdout)
        print()
        return
    print(f"peak MiB of a process after each quarter of {n} iterations of 8 tasks")
    for name, peaks in flat.items():
        print(f"  {name:<24}" + "".join(f"{peak:9.0f}" for peak in peaks))
    print("\npeak MiB of a process before and after one meta-gradient of Conv4-64, 5-way 1-shot")
    for name, (before, after) in large.items():
        print(f"  {name:<42}{before:9.0f}{after:9.0f}")


if __name__ == "__main__":
    main()
