"""Heat maps of the grids, and a table of each method's best fields."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from metamom.common import tables
from metamom.experiments.sensitivity.grid import Field, Outcome
from metamom.experiments.sensitivity.methods import METHODS, methods_at
from metamom.experiments.sensitivity.settings import SETTINGS
from metamom.experiments.shared.figures import heat_map, save

Values = npt.NDArray[np.float64]

NEAR = 1.5  # fields within this factor of the fewest steps count as near


class Grid(NamedTuple):
    """One method at one level of bias, ``[lrs, betas]`` each.

    Attributes:
        lrs: the step sizes of the rows.
        betas: the betas of the columns.
        steps: the upper median over the seeds of the iterations to the target, infinite where one diverged or never
            reached it.
        error: the mean of the seeds' last validation errors; infinite if one diverged.
        diverged: the fraction of seeds that diverged.
    """

    lrs: tuple[float, ...]
    betas: tuple[float, ...]
    steps: Values
    error: Values
    diverged: Values


def grid_of(outcomes: Mapping[Field, Outcome], setting: str, level: str, method: str) -> Grid:
    """Combine the seeds' outcomes."""
    chosen = SETTINGS[setting]
    lrs, betas = METHODS[method].grid(chosen.lr_scale, chosen.lr_count), chosen.betas
    grid = Grid(lrs, betas, *(np.full((len(lrs), len(betas)), math.inf) for _ in range(3)))
    for i, lr in enumerate(lrs):
        for j, beta in enumerate(betas):
            seeds = [outcomes[Field(setting, level, method, lr, beta, seed)] for seed in range(chosen.seeds)]
            steps = sorted(
                math.inf if seed.diverged else seed.steps_to(chosen.target, chosen.evaluate_every) for seed in seeds
            )
            grid.steps[i, j] = steps[len(steps) // 2]
            grid.error[i, j] = np.mean([math.inf if seed.diverged else seed.errors[-1] for seed in seeds])
            grid.diverged[i, j] = np.mean([seed.diverged for seed in seeds])
    return grid


def table(outcomes: Mapping[Field, Outcome], setting: str) -> str:
    """Each method's best at each level, in Markdown; momentum and plain SGD are columns of the same grid."""
    chosen = SETTINGS[setting]
    lines = [
        f"{chosen.iterations} iterations of {chosen.meta_batch} tasks on {chosen.workers} workers, seeds below",
        f"{chosen.seeds}; target: validation error {chosen.target:g} on {chosen.validation_tasks} tasks, looked at",
        f"every {chosen.evaluate_every} iterations. Steps are medians over the seeds, errors means. Fields near:",
        f"share of the grid that gets there in at most {NEAR:g} times the method's fewest steps.",
        "",
        *tables.head("bias", "method", "fewest steps (γ, β)", "last error (γ, β)", "diverged", "fields near"),
    ]
    for level in chosen.levels:
        for key, method in methods_at(chosen.methods, level).items():
            grid = grid_of(outcomes, setting, level, key)
            sides = {method.title: grid}
            if key == "momentum":
                plain = [j for j, beta in enumerate(grid.betas) if beta == 1]
                sides = {"SGD": _columns(grid, plain)}
                sides["momentum"] = _columns(grid, [j for j in range(len(grid.betas)) if j not in plain])
            lines += [_row(level, title, side) for title, side in sides.items()]
    return "\n".join(lines)


def figure(outcomes: Mapping[Field, Outcome], setting: str, level: str, path: Path) -> None:
    """Draw heat maps of every method at one level: steps to the target, last error, and the share of diverged seeds."""
    chosen = SETTINGS[setting]
    methods = methods_at(chosen.methods, level)
    grids = {key: grid_of(outcomes, setting, level, key) for key in methods}
    titles = [f"iterations to an error of {chosen.target:g}", "last error", "share diverged"]
    if not any(grid.diverged.any() for grid in grids.values()):
        titles.pop()
    height = 0.75 + 0.3 * chosen.lr_count
    drawing = Figure(figsize=(1 + 2.4 * len(titles), height * len(methods) + 0.6), layout="constrained")
    panels = drawing.subplots(len(methods), len(titles), squeeze=False)
    for row, (key, method) in zip(panels, methods.items(), strict=True):
        grid = grids[key]
        for panel, values in zip(row, (grid.steps, grid.error), strict=False):
            best = [_best(values)] if np.isfinite(values).any() else []
            heat_map(panel, grid.lrs, grid.betas, values, best=best)
        for panel in row[2:]:
            heat_map(panel, grid.lrs, grid.betas, grid.diverged, log=False)
        row[0].set_ylabel(f"{method.title.replace(': ', ':' + chr(10)).replace('; ', ';' + chr(10))}\nγ")
    for panel, title in zip(panels[0], titles, strict=True):
        panel.set_title(title)
    for panel in panels[-1]:
        panel.set_xlabel("β")
    drawing.suptitle(f"{chosen.title}; bias: {level}" + "; none diverged" * (len(titles) < 3))
    save(drawing, path)


def _row(level: str, title: str, grid: Grid) -> str:
    cells = []
    for values, form in ((grid.steps, "{:.0f}"), (grid.error, "{:.3g}")):
        i, j = _best(values)
        known = np.isfinite(values[i, j])
        cells.append(f"{form.format(values[i, j])} ({grid.lrs[i]:g}, {grid.betas[j]:g})" if known else "never")
    near = np.isfinite(grid.steps) & (grid.steps <= NEAR * grid.steps.min())
    return tables.row(level, title, *cells, f"{grid.diverged.mean():.0%}", f"{near.mean():.0%}")


def _columns(grid: Grid, columns: list[int]) -> Grid:
    """The columns of the given betas."""
    betas = tuple(grid.betas[j] for j in columns)
    return Grid(grid.lrs, betas, grid.steps[:, columns], grid.error[:, columns], grid.diverged[:, columns])


def _best(values: Values) -> tuple[int, int]:
    """Row and column of the smallest value."""
    row, column = np.unravel_index(int(values.argmin()), values.shape)
    return int(row), int(column)
