"""Many runs of one method at once: all step sizes and seeds of a problem."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from metamom.bias.coordinates import place_of
from metamom.bias.state import State
from metamom.experiments.leaderboard.batched import means, operator_for
from metamom.experiments.leaderboard.methods import Setup
from metamom.experiments.leaderboard.problems import Problem
from metamom.experiments.leaderboard.rules import RULES, Memory

FAR = 1e6  # a run has diverged when its error is this many times the start's
LARGE = 1e12  # and when an entry of a gradient is as large


class Record(NamedTuple):
    """What E readings show of G step sizes with S seeds each.

    Attributes:
        steps: number of updates before each reading, ``[E]``.
        bytes: what one worker has sent until then, ``[E]``.
        errors: ``[E, G, S]``; infinite from where a run diverges.
    """

    steps: Tensor
    bytes: Tensor
    errors: Tensor


def readings(problem: Problem, steps: int) -> int:
    """How often a run's error is read."""
    return len(range(0, steps, problem.every)) + 1


def run(problem: Problem, setup: Setup, lrs: Sequence[float], seeds: Sequence[int], steps: int) -> Record:
    """Run a method from the problem's start, the same samples for every step size.

    Args:
        problem: what to run on.
        setup: the method.
        lrs: G step sizes.
        seeds: S seeds, each of a run's samples; the operator's draws depend on all of them together.
        steps: number of updates.
    """
    samples = [torch.Generator().manual_seed(seed) for seed in seeds]
    operator = operator_for(setup.spec, torch.Generator().manual_seed(_number(problem.name, setup, lrs, seeds)))
    x = problem.start.expand(len(lrs), len(seeds), -1).clone()
    lr = torch.tensor(lrs, dtype=x.dtype).view(-1, 1, 1)
    d, n = x.shape[-1], problem.workers
    alive = torch.ones(x.shape[:2], dtype=torch.bool)
    worst = FAR * problem.error(problem.start.view(1, 1, -1))
    memory: Memory = {}
    state, sent, read = State(), 0, []

    def check(k: int) -> None:
        error = problem.error(x)
        alive.logical_and_(error < worst)  # also false for a NaN
        read.append((k, sent, torch.where(alive, error.double(), math.inf)))

    for k in range(steps):
        if k % problem.every == 0:
            check(k)
        sample = problem.draw(samples)

        def server(points: Tensor, k: int = k, sample: object = sample) -> Tensor:
            nonlocal state, sent
            rows = problem.messages(points, sample)
            alive.logical_and_((rows.abs() < LARGE).all(-1).all(-1))
            rows = torch.where(alive[..., None, None], rows, 0).reshape(-1, d)
            sent += operator.step_bytes(k, d)
            out, state = operator.transition(rows, state, place_of(rows, k, None))
            if k == 0:
                operator.store(state)  # the size of its messages may depend on whether there were any
            return means(out.view(*points.shape[:2], n, d), setup.aggregate)

        moved = RULES[setup.rule](x, server, lr, setup, memory, k)
        x = torch.where(alive.unsqueeze(-1), moved, problem.start)
    check(steps)
    numbers, sizes, errors = zip(*read, strict=True)
    return Record(torch.tensor(numbers), torch.tensor(sizes), torch.stack(errors))


def _number(*of: object) -> int:
    """A seed that differs between methods and problems."""
    return int.from_bytes(hashlib.sha256(repr(of).encode()).digest()[:7], "little")
