"""Many logical workers in one process: their time, their memory, and whether their bytes match the model."""

from __future__ import annotations

import time
from typing import NamedTuple

from tqdm import tqdm

from metamom.common import tables
from metamom.experiments.scaling import model
from metamom.experiments.scaling.model import Kind, Plan
from metamom.experiments.scaling.problems import ScalingPlan, make, operator
from metamom.experiments.shared.peak import alone, peak_mib

TITLE = "Simulated: workers of one process"
STEPS = 3  # timed steps, after a first one


class Run(NamedTuple):
    """Workers with one task each.

    Attributes:
        hidden: `Problem.hidden`.
        workers: their number n.
        spec: the operator.
        chunk_size: tasks at a time.
    """

    hidden: int | None
    workers: int
    spec: str
    chunk_size: int | None


class Simulated(NamedTuple):
    """The result of a run.

    Attributes:
        seconds: the time of the fastest step.
        before: peak MiB without the steps.
        peak: peak MiB with them.
        logged: a step's ``wire_bytes``.
        predicted: the model's bytes.
    """

    seconds: float
    before: float
    peak: float
    logged: int
    predicted: int


def simulate(run: Run) -> list[float]:
    """Simulate in this process, which should do nothing else."""
    made, bias = make(run.hidden, run.chunk_size, real=False), operator(run.spec)
    batch, d = made.tasks.sample(0, run.workers), made.entries
    before, seconds, logged = peak_mib(), [], 0
    for _ in range(1 + STEPS):
        begin = time.perf_counter()
        made.learner.zero_grad()
        found = made.learner.backward(batch, workers=run.workers, bias=bias, measure=False)
        seconds.append(time.perf_counter() - begin)
        logged = int(found.metrics["wire_bytes"] or 0)
    kind = Kind(4 * d if bias is None else bias.wire_bytes(d), dense=bias is None)
    predicted = model.wire_bytes(Plan(run.workers, 1, 1, 4 * d, 0), kind)
    return [min(seconds[1:]), before, peak_mib(), logged, predicted]


def runs(config: ScalingPlan) -> list[Run]:
    """The simulations: sinusoids for several numbers of workers, Conv4 where ``[n, d]`` is large."""
    found = [Run(None, workers, "topk:1%", chunk) for chunk in (None, config.chunk) for workers in config.workers]
    of_conv4 = [("topk:1%", None), ("topk:1%", config.chunk), ("ef21:topk:1%", config.chunk)]
    return found + [Run(config.hidden, config.convolved, spec, chunk) for spec, chunk in of_conv4]


def answer(config: ScalingPlan) -> str:
    """Run all simulations, each in its own process, and return the results in Markdown.

    Raises:
        RuntimeError: if a run's bytes differ from the model's.
    """
    found = {run: _done(run) for run in tqdm(runs(config), desc="simulated", disable=None)}
    lines = [
        f"`MAML.backward` with a task for each worker, one thread, in its own process; the fastest of {STEPS} steps. "
        "The memory that a run has added is next to the peak; the gradients of all workers at once would take n · d "
        "· 4 bytes.",
        "",
        *tables.head(
            "workers, operator, chunk_size",
            "seconds",
            "ms a worker",
            "peak MiB",
            "added",
            "n · d · 4, MiB",
            "wire_bytes",
        ),
    ]
    for run, each in found.items():
        name = "sinusoid MLP" if run.hidden is None else f"Conv4-{run.hidden}"
        dense = 4 * make(run.hidden, real=False).entries * run.workers / 2**20
        lines.append(
            tables.row(
                f"{name}, {run.workers:,}, {run.spec}, {run.chunk_size or 'none'}",
                f"{each.seconds:.3g}",
                f"{1e3 * each.seconds / run.workers:.3g}",
                f"{each.peak:.0f}",
                f"{each.peak - each.before:.0f}",
                f"{dense:.1f}",
                f"{each.logged:,}",
            )
        )
    return "\n".join([*lines, "", *_growth(found, config)])


def _growth(found: dict[Run, Simulated], config: ScalingPlan) -> list[str]:
    few, *_, many = config.workers
    said = []
    for chunk in (None, config.chunk):
        first, last = (found[Run(None, n, "topk:1%", chunk)] for n in (few, many))
        said.append(f"{last.seconds / first.seconds:.3g} times with chunk_size={chunk}")
    return [
        f"From {few} to {many:,} workers, {many / few:g} times as many, a step of the sinusoid MLP takes "
        f"{' and '.join(said)}. Logged bytes match the model in all {len(found)} runs."
    ]


def _done(run: Run) -> Simulated:
    seconds, before, peak, logged, predicted = alone(simulate, run)
    if logged != predicted:
        raise RuntimeError(f"{run} logged {logged:.0f} bytes, but the model predicts {predicted:.0f}.")
    return Simulated(seconds, before, peak, int(logged), int(predicted))
