"""The model's constants, measured in this process: compute by number of tasks, operators by length of gradients."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from metamom.bias import BiasOperator
from metamom.experiments.scaling import fit
from metamom.experiments.scaling.model import Kind, Line
from metamom.experiments.scaling.problems import Problem, ScalingPlan, make, operator
from metamom.optim import CompositeMomentum

MANY = 9  # number of messages to decode, besides one


def median(seconds: Sequence[float]) -> float:
    """The median of timings."""
    return float(np.median(seconds))


def of_compute(problem: Problem, config: ScalingPlan) -> list[dict[str, Any]]:
    """Seconds of a backward pass and an optimizer step by the number of tasks, as JSON values."""
    made = make(problem.hidden)
    optimizer = CompositeMomentum(made.learner.parameters(), lr=1e-4)
    found = []
    for times in tqdm(config.compute, desc=f"compute, {problem.name}", leave=False, disable=None):
        tasks = max(1, times * problem.weak // 4)
        batch = made.tasks.sample(0, tasks)

        def step(batch: Any = batch) -> None:
            optimizer.zero_grad()
            made.learner.backward(batch, measure=False)
            optimizer.step()

        found.append({"problem": problem.name, "tasks": tasks, "seconds": _timed(step, config.repeats)})
    return found


def of_operators(config: ScalingPlan) -> list[dict[str, Any]]:
    """Seconds of a call, of encoding a message, of decoding one and several, as JSON values."""
    specs = [spec for spec in config.planned if operator(spec) is not None]
    found = []
    for d in tqdm(config.entries, desc="operators", leave=False, disable=None):
        gradients = torch.randn(MANY, d, generator=torch.Generator().manual_seed(0))
        for spec in specs:
            made = operator(spec)
            assert made is not None
            found.append({"operator": spec, "entries": d, **_of_operator(made, gradients, config.repeats)})
    return found


def _of_operator(made: BiasOperator, gradients: torch.Tensor, repeats: int) -> dict[str, list[float]]:
    d = gradients.shape[1]
    one = gradients[:1]
    messages = made.send(gradients, step=0, workers=range(len(gradients)))
    sent = {
        "encode": _timed(lambda: made.send(one, step=0, workers=[0]), repeats),
        "one": _timed(lambda: made.receive(messages[:1], d, one.dtype), repeats),
        "many": _timed(lambda: made.receive(messages, d, one.dtype), repeats),
    }
    return {**sent, "apply": _timed(lambda: made(one, step=0, workers=[0]), repeats)}


def _timed(call: Callable[[], object], repeats: int) -> list[float]:
    call()
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return seconds


def compute_line(timings: Sequence[dict[str, Any]], problem: str) -> Line:
    """Seconds by the number of tasks."""
    return fit.line([(each["tasks"], median(each["seconds"])) for each in timings if each["problem"] == problem])


def kind_of(timings: Sequence[dict[str, Any]], spec: str, d: int) -> Kind:
    """An operator on gradients of d float32 entries: its own bytes, and seconds from a line through the timings."""
    made = operator(spec)
    if made is None:
        return Kind(message=4 * d, dense=True)
    rows = [each for each in timings if each["operator"] == spec]

    def at(seconds: Callable[[dict[str, Any]], float]) -> float:
        return fit.line([(row["entries"], max(seconds(row), 1e-9)) for row in rows])(d)

    each = at(lambda row: (median(row["many"]) - median(row["one"])) / (MANY - 1))
    one = at(lambda row: median(row["one"]))
    return Kind(
        message=made.wire_bytes(d),
        dense=not made.compresses,
        apply=at(lambda row: median(row["apply"])),
        encode=at(lambda row: median(row["encode"])),
        decode=Line(max(0.0, one - each), each),
    )
