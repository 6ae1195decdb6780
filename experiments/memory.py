"""How much memory meta-gradients need: over thousands of iterations, and for a meta-batch of 1,000 tasks.

    python -m metamom.experiments.memory [--iterations 2000] [--tasks 1000] [--eager] [--json]

Each line is measured in its own process, by the largest resident set that the system reports: any kind of leak
raises it from one quarter of the iterations to the next. As in `metamom train`, the process keeps the memory that it
frees (`metamom.common.allocator.keep_freed_memory`); the peaks without that differ by a few per cent. TorchInductor's
own compiling processes are not counted.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F
from tqdm import tqdm

from metamom.common.checks import AT_ONCE, MOST
from metamom.common.flag_types import count
from metamom.compile.graph import CompileMode
from metamom.experiments.shared.peak import alone, peak_mib
from metamom.maml.chunking import ChunkSize
from metamom.maml.learner import MAML
from metamom.nets.models import Conv4, SinusoidMLP
from metamom.optim import CompositeMomentum
from metamom.tasks import Episodes, Sinusoid
from metamom.tasks.family import TaskFamily
from metamom.training.directory import environment

QUARTERS = 4
TASKS = 8  # per iteration; a run with more of them has fewer iterations, with the same total of tasks


class LongRun(NamedTuple):
    """A meta-gradient that is computed over and over.

    Attributes:
        hidden: channels of the Conv4; ``None`` for the sinusoid MLP.
        compile: the learner's option.
        tasks: per iteration.
        chunk_size: the learner's option.
    """

    hidden: int | None
    compile: CompileMode = False
    tasks: int = TASKS
    chunk_size: ChunkSize = None

    def __str__(self) -> str:
        name = "sinusoid MLP" if self.hidden is None else f"Conv4-{self.hidden}"
        size = "" if self.chunk_size is None else f', chunk_size="{self.chunk_size}"'
        return f"{name}, {self.tasks} tasks{size}{', compiled' if self.compile else ''}"


class LargeBatch(NamedTuple):
    """One meta-gradient of Conv4-64: how many tasks, and the learner's options."""

    tasks: int
    chunk_size: ChunkSize
    compile: CompileMode = False

    def __str__(self) -> str:
        size = "" if self.chunk_size is None else f', chunk_size="{self.chunk_size}"'
        return f"{self.tasks} tasks{size}{', compiled' if self.compile else ''}"


def long_runs(most_tasks: int) -> list[LongRun]:
    """The measured cases; with chunks, none has more than ``most_tasks`` tasks per iteration."""
    in_chunks = LongRun(64, tasks=min(most_tasks, 64), chunk_size="auto")
    return [LongRun(None), LongRun(None, True), LongRun(16), LongRun(16, True), in_chunks]


def large_batches(tasks: int) -> list[LargeBatch]:
    """The measured cases; without chunks, only as many tasks as fit on any machine."""
    return [LargeBatch(min(tasks, 64), None), LargeBatch(tasks, "auto"), LargeBatch(tasks, "auto", True)]


def flatness(run: LongRun, iterations: int) -> list[float]:
    """Peak MiB after each quarter of ``iterations`` iterations of `TASKS` tasks, or of fewer, larger iterations."""
    generator = torch.Generator().manual_seed(0)
    options: dict[str, Any] = {"compile": run.compile, "chunk_size": run.chunk_size}
    if run.hidden is None:
        learner = MAML(SinusoidMLP(generator=generator), F.mse_loss, **options)
        tasks: TaskFamily = Sinusoid()
    else:
        learner = MAML(Conv4(5, hidden=run.hidden, generator=generator), F.cross_entropy, inner_lr=0.4, **options)
        tasks = _episodes()
    optimizer = CompositeMomentum(learner.parameters(), lr=1e-3)
    a_quarter = max(1, iterations * TASKS // run.tasks // QUARTERS)
    peaks = []
    for step in tqdm(range(QUARTERS * a_quarter), desc=str(run), leave=False, disable=None):
        optimizer.zero_grad()
        learner.backward(tasks.sample(step, run.tasks))
        optimizer.step()
        if (step + 1) % a_quarter == 0:
            peaks.append(peak_mib())
    return peaks


def large_batch(given: LargeBatch) -> list[float]:
    """Peak MiB before and after one meta-gradient of Conv4-64 over 5-way 1-shot tasks."""
    model = Conv4(5, generator=torch.Generator().manual_seed(0))
    learner = MAML(model, F.cross_entropy, inner_lr=0.4, chunk_size=given.chunk_size, compile=given.compile)
    batch = _episodes().sample(0, given.tasks)
    before = peak_mib()
    learner.backward(batch)
    return [before, peak_mib()]


def _episodes() -> Episodes:
    images = torch.rand(40, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    return Episodes(images, torch.arange(40) // 4, ways=5, shots=1, queries=1)


def main(words: Sequence[str] | None = None) -> None:
    """Measure and print.

    Args:
        words: the arguments of the command line; by default the process's.
    """
    parser = argparse.ArgumentParser(
        prog="python -m metamom.experiments.memory",
        description="Measure the memory of meta-gradients.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--iterations", type=count(MOST, 1), default=2000, help=("iterations of the long runs (default: 2000)")
    )
    parser.add_argument(
        "--tasks", type=count(AT_ONCE, 1), default=1000, help=("tasks of the large meta-batch (default: 1000)")
    )
    parser.add_argument("--eager", action="store_true", help="leave out the compiled cases")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    arguments = parser.parse_args(words)
    if arguments.iterations < QUARTERS or arguments.tasks < 1:
        parser.error(f"--iterations must be >= {QUARTERS} and --tasks >= 1")
    n, eager = arguments.iterations, arguments.eager
    flat, large = {}, {}

    def say(text: str) -> None:
        if not arguments.json:
            print(text, flush=True)  # a line may take minutes

    say(f"peak MiB of a process after each quarter of {n * TASKS} tasks, {TASKS} or more of them an iteration")
    for run in long_runs(arguments.tasks):
        if not (run.compile and eager):
            peaks = flat[str(run)] = alone(flatness, run, n)
            say(f"  {run!s:<42}" + "".join(f"{peak:9.0f}" for peak in peaks))
    say("\npeak MiB of a process before and after one meta-gradient of Conv4-64, 5-way 1-shot")
    for batch in large_batches(arguments.tasks):
        if not (batch.compile and eager):
            before, after = large[str(batch)] = alone(large_batch, batch)
            say(f"  {batch!s:<42}{before:9.0f}{after:9.0f}")
    if arguments.json:
        print(json.dumps({"environment": environment(), "iterations": n, "flat": flat, "large": large}))


if __name__ == "__main__":
    main()
