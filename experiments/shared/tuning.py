"""The tuning protocol: SGD and momentum search the same step sizes, and the best of each side runs again."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, NamedTuple

from tqdm import tqdm

# (gamma, beta, seed, cap) -> steps until the target, infinite if it takes more than the cap or diverges
Run = Callable[[float, float, int, int], float]


class Cell(NamedTuple):
    """One gamma and beta, and its steps over the seeds of the search: their median, or what the search took instead."""

    lr: float
    beta: float
    steps: float


class Side(NamedTuple):
    """SGD or momentum: its best cell, and that cell's steps on seeds outside the search."""

    best: Cell
    again: list[float]

    @property
    def steps(self) -> float:
        """The median of these steps."""
        return median(self.again)


class Tuned(NamedTuple):
    """Every cell of the search, and the two sides."""

    cells: list[Cell]
    sgd: Side
    momentum: Side

    @property
    def speedup(self) -> float:
        """SGD's steps divided by momentum's."""
        return self.sgd.steps / self.momentum.steps


def counted(run: Run, bar: tqdm[Any]) -> Run:
    """The same, and advance a progress bar."""

    def and_count(lr: float, beta: float, seed: int, cap: int) -> float:
        steps = run(lr, beta, seed, cap)
        bar.update()
        return steps

    return and_count


HEAD = ("SGD: γ", "steps", "momentum: γ, β", "steps", "ratio")


def cells(tuned: Tuned) -> tuple[str, ...]:
    """Both sides, for a table: SGD's gamma and steps, momentum's gamma, beta and steps, and their ratio."""
    sgd, momentum = tuned.sgd, tuned.momentum
    ratio = "–" if math.isnan(tuned.speedup) else f"{tuned.speedup:.2f}"
    at_sgd = f"{sgd.best.lr:g}" if math.isfinite(sgd.best.steps) else "–"
    at_momentum = f"{momentum.best.lr:g}, {momentum.best.beta:g}" if math.isfinite(momentum.best.steps) else "–"
    return at_sgd, spread(sgd.again), at_momentum, spread(momentum.again), ratio


def spread(values: Sequence[float]) -> str:
    """The median, and all values."""
    if not any(math.isfinite(value) for value in values):
        return "never"
    return f"{median(values):g} ({listed(sorted(values))})" if len(values) > 1 else f"{values[0]:g}"


def listed(values: Sequence[float]) -> str:
    """Numbers separated by commas."""
    return ", ".join(f"{value:g}" if math.isfinite(value) else "never" for value in values)


def tune(
    run: Run,
    lrs: Sequence[float],
    betas: Sequence[float],
    *,
    first: float,
    seeds: Sequence[int],
    again: Sequence[int],
    cap: int,
    patience: float = 1.25,
    tries: int = 2,
) -> Tuned:
    """Search, then run the best of each side on other seeds (without any, use the search's own steps).

    For each beta, step sizes are tried from ``first`` upwards, then downwards; a direction ends after ``tries`` in a
    row that are slower than the best so far or do not arrive. A run is stopped at ``patience`` times the best so far.
    """
    cells = [
        cell
        for beta in betas
        for cell in search_lrs(
            run, sorted(lrs), beta, first=first, seeds=seeds, cap=cap, patience=patience, tries=tries
        )
    ]
    sides = []
    for chosen in ([c for c in cells if c.beta == 1], [c for c in cells if c.beta < 1]):
        best = min(chosen, key=lambda cell: cell.steps)
        sides.append(Side(best, [run(best.lr, best.beta, seed, cap) for seed in again] or [best.steps]))
    return Tuned(cells, *sides)


def search_lrs(
    run: Run,
    lrs: Sequence[float],
    beta: float,
    *,
    first: float,
    seeds: Sequence[int],
    cap: int,
    patience: float = 1.25,
    tries: int = 2,
    over: Callable[[Sequence[float]], float] = median,
) -> list[Cell]:
    """The search of one beta, as `tune` has it; ``over`` sums up the steps of the seeds."""
    cells: list[Cell] = []
    fewest = math.inf
    for direction in ([lr for lr in lrs if lr >= first], [lr for lr in reversed(lrs) if lr < first]):
        slower = 0
        for lr in direction:
            limit = min(cap, math.ceil(patience * fewest)) if math.isfinite(fewest) else cap
            cell = Cell(lr, beta, over([run(lr, beta, seed, limit) for seed in seeds]))
            cells.append(cell)
            slower = 0 if cell.steps < fewest else slower + 1
            fewest = min(fewest, cell.steps)
            if slower == tries:
                break
    return cells
