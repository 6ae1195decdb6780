"""One cell of the leaderboard: a method on a problem, each question with the step size that is best for it.

Three questions: the error after all steps, the error after the same bytes, and the steps and bytes to the target. Some
seeds choose the step sizes; others measure with them, so that the best of a grid is not luck.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from metamom.common.intervals import student_halfwidth
from metamom.experiments.leaderboard.methods import Setup
from metamom.experiments.leaderboard.problems import Problem
from metamom.experiments.leaderboard.running import Record, run
from metamom.experiments.leaderboard.suite import Plan

MEASURED = 1000  # the first seed of those that measure


def after_steps(record: Record, plan: Plan) -> Tensor:
    """The mean error of the last steps, ``[G, S]``."""
    return record.errors[-_last(len(record.steps), plan) :].mean(0)


def after_bytes(record: Record, plan: Plan, budget: int) -> Tensor:
    """The mean error of the last steps within a budget of bytes, ``[G, S]``."""
    within = int((record.bytes <= budget).sum())
    return record.errors[within - _last(within, plan) : within].mean(0)


def to_target(record: Record, target: float, of: Tensor) -> Tensor:
    """``of [E]``, the steps or bytes, where each run first has the target; infinite where it never has, ``[G, S]``."""
    there = record.errors <= target
    first = there.to(torch.uint8).argmax(0)
    return torch.where(there.any(0), of.to(torch.float64)[first], math.inf)


def best(values: Tensor) -> int | None:
    """The row ``[G, S]`` with the smallest mean; ``None`` if none is finite.

    Where no step size brings every seed to a target, the one that brings the most.
    """
    means = values.mean(1)
    if bool(means.isfinite().any()):
        return int(means.argmin())
    counts = values.isfinite().sum(1)
    return int(counts.argmax()) if int(counts.max()) > 0 else None


def interval(values: Sequence[float]) -> dict[str, Any]:
    """Mean and half-width of Student's 95 % interval over seeds; without, if some seed has no finite value."""
    finite = [value for value in values if math.isfinite(value)]
    out: dict[str, Any] = {"seeds": len(values), "finite": len(finite), "mean": None, "halfwidth": None}
    if len(finite) == len(values):
        equal = len(set(values)) == 1
        out |= {"mean": math.fsum(values) / len(values), "halfwidth": 0.0 if equal else student_halfwidth(values)}
    return out


def measure(problem: Problem, setup: Setup, plan: Plan) -> dict[str, Any]:
    """Search the step sizes and measure; a plain value for JSON."""
    began, d, plan = time.perf_counter(), len(problem.start), plan.on(problem)
    budget = plan.budget(d)
    asked: dict[str, Callable[[Record], Tensor]] = {
        "steps": lambda record: after_steps(record, plan),
        "bytes": lambda record: after_bytes(record, plan, budget),
        "target": lambda record: to_target(record, problem.target, record.steps),
    }
    searched = run(problem, setup, plan.lrs, range(plan.search_seeds), plan.steps)
    chosen = {question: best(value(searched)) for question, value in asked.items()}
    rows = sorted({row for row in chosen.values() if row is not None})
    out: dict[str, Any] = {"problem": problem.name, **setup._asdict(), "budget": budget}
    out["start"] = float(problem.error(problem.start.view(1, 1, -1)))
    if rows:
        record = run(
            problem, setup, [plan.lrs[row] for row in rows], range(MEASURED, MEASURED + plan.seeds), plan.steps
        )
        out["bytes_a_step"] = float(record.bytes[-1]) / plan.steps
    for question, row in chosen.items():
        if row is None:
            out[question] = None
            continue
        at = rows.index(row)
        found = interval(asked[question](record)[at].tolist())
        found |= {"lr": plan.lrs[row], "edge": row in (0, len(plan.lrs) - 1)}
        if question == "target":
            sent = interval(to_target(record, problem.target, record.bytes)[at].tolist())
            found |= {"bytes": sent["mean"], "bytes_halfwidth": sent["halfwidth"]}
        out[question] = found
    return out | {"seconds": round(time.perf_counter() - began, 1)}


def _last(readings: int, plan: Plan) -> int:
    return max(1, round(plan.last * readings))
