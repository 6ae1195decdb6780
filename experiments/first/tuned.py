"""Tune step size and beta under bias, for plain SGD and for momentum, and run the best of each again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from metamom.bias.coordinates import NonFiniteError
from metamom.bias.spec import parse
from metamom.common import tables
from metamom.experiments.first.workers import OPERATORS, workers_that_differ
from metamom.experiments.quadratics import Measured, descend, measured, steps_to
from metamom.experiments.shared.figures import heat_map, save
from metamom.experiments.shared.numerals import shortest

Values = npt.NDArray[np.float64]

TITLE = "Step size and β under bias"


@dataclass(frozen=True)
class TunedMethods:
    """The grid is the same for every operator; the best are measured with twice the runs and different noise."""

    noise: float = 0.3
    lrs: tuple[float, ...] = tuple(2.0**power for power in range(-5, 6))
    betas: tuple[float, ...] = (1.0, 0.5, 0.3, 0.1, 0.05)
    steps: int = 400
    last: int = 100
    runs: int = 10
    share: float = 0.01  # the target, as a fraction of the first squared gradient norm


class Grid(NamedTuple):
    """``[lrs, betas]`` each: steps to the target (infinite if never), and floors (infinite for runs that diverged)."""

    steps: Values
    floors: Values


def run(config: TunedMethods, spec: str, lr: float, beta: float, *, seed: int, runs: int) -> Tensor:
    """``||grad f(x_k)||^2``, ``[steps, runs]``."""
    problem, start = workers_that_differ()
    return descend(
        problem, start, lr=lr, beta=beta, steps=config.steps, bias=parse(spec), noise=config.noise, runs=runs, seed=seed
    ).grad_sq


def search(config: TunedMethods, spec: str) -> Grid:
    """Run every step size with every beta, on the same noise."""
    grid = Grid(*(np.full((len(config.lrs), len(config.betas)), math.inf) for _ in Grid._fields))
    for i, lr in enumerate(config.lrs):
        for j, beta in enumerate(config.betas):
            try:
                values = run(config, spec, lr, beta, seed=1, runs=config.runs)
            except NonFiniteError:
                continue  # the run diverged
            trajectory, floor = values.mean(1), float(values[-config.last :].mean())
            if floor < float(trajectory[0]):
                grid.floors[i, j] = floor
                steps = steps_to(trajectory, config.share * float(trajectory[0]))
                grid.steps[i, j] = math.inf if steps is None else steps
    return grid


def best(values: Values, columns: list[int]) -> tuple[int, int]:
    """Row and column of the smallest value among the given columns."""
    row, at = np.unravel_index(values[:, columns].argmin(), (len(values), len(columns)))
    return int(row), columns[int(at)]


def show(figure_path: Path, config: TunedMethods = TunedMethods()) -> str:
    """Search, run the best again, draw the heat maps, and return the table in Markdown."""
    lines = [
        f"The same workers with noise {config.noise}, {config.steps} steps, {config.runs} runs for every γ ∈",
        f"{{{_listed(config.lrs)}}} and β ∈ {{{_listed(config.betas)}}}.",
        f"The best of plain SGD (β = 1) and of momentum (β < 1) again with {2 * config.runs} runs of other noise:",
        f"steps to {config.share:.0%} of the first ‖∇f‖²; floor: mean of the last {config.last} steps.",
        "",
        *tables.head("operator", "method", "γ, β for speed", "steps", "γ, β for the floor", "floor of ‖∇f‖²"),
    ]
    sides = {
        "plain SGD": [j for j, beta in enumerate(config.betas) if beta == 1],
        "momentum": [j for j, beta in enumerate(config.betas) if beta < 1],
    }
    figure = Figure(figsize=(3.6 * len(OPERATORS) + 1, 7), layout="constrained")
    panels = figure.subplots(2, len(OPERATORS), squeeze=False)
    for column, spec in enumerate(tqdm(OPERATORS, desc="tuned", disable=None)):
        grid = search(config, spec)
        for method, columns in sides.items():
            fast, low = best(grid.steps, columns), best(grid.floors, columns)
            cells = [f"{shortest(config.lrs[i])}, {shortest(config.betas[j])}" for i, j in (fast, low)]
            again = [
                run(config, spec, config.lrs[i], config.betas[j], seed=2, runs=2 * config.runs) for i, j in (fast, low)
            ]
            steps, floor = _steps(again[0], config.share), measured(again[1][-config.last :].mean(0))
            lines.append(tables.row(spec, method, cells[0], steps, cells[1], floor))
        for panel, what, values in (
            (panels[0, column], f"steps to {config.share:.0%}", grid.steps),
            (panels[1, column], "floor of ‖∇f‖²", grid.floors),
        ):
            heat_map(
                panel, config.lrs, config.betas, values, best=[best(values, columns) for columns in sides.values()]
            )
            panel.set(xlabel="β", ylabel="γ", title=f"{spec}: {what}")
    save(figure, figure_path)
    return "\n".join(lines)


def _steps(values: Tensor, share: float) -> Measured | str:
    """Steps to the target over runs; the number of runs that reached it, if not all did."""
    target = share * float(values[0].mean())
    every = [steps_to(trajectory, target) for trajectory in values.T]
    arrived = values.new_tensor([k for k in every if k is not None])
    return measured(arrived) if len(arrived) == len(every) else f"{len(arrived)} of {len(every)} runs arrive"


def _listed(numbers: Sequence[float]) -> str:
    return ", ".join(map(shortest, numbers))
