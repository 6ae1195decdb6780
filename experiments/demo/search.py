"""The search: gamma and beta for both methods in every case, on seeds that the demo does not use."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch

from metamom.common import tables
from metamom.common.allocator import keep_freed_memory
from metamom.common.files import write_atomically
from metamom.common.schema import read_record
from metamom.experiments.demo.settings import METHODS, Case, Choice, Demo, Method, Tuned
from metamom.experiments.shared.overall import Steps
from metamom.experiments.shared.processes import run_in_processes
from metamom.experiments.shared.sinusoid_bench import SinusoidBench
from metamom.experiments.shared.tuning import Cell, search_lrs
from metamom.training.directory import RunDirectory, environment

COMMAND = "python -m metamom.experiments.demo --search"


@dataclass(frozen=True)
class Search:
    """The grid, the same step sizes for both methods.

    Attributes:
        lrs: gamma, a factor of the square root of 2 apart. The search of each beta begins where its case says; it
            goes up, then down, and leaves a direction at the first that is slower than the best so far.
        betas: 1 is plain meta-SGD. Where momentum's best is the smallest or the largest of the others, the next of
            ``more`` is searched too. (The largest of all has plain meta-SGD above it.)
        more: further values of beta.
        seeds: none of the demo's; a gamma and beta must reach the target on all of them.
        patience: a run is stopped at so many times the best so far.
        compile: whether runs are compiled, which is faster once a compiler has taken its time, and rounds differently.
    """

    lrs: tuple[float, ...] = tuple(round(2.0 ** (power / 2), 4) for power in range(-16, 7))
    betas: tuple[float, ...] = (1.0, 0.5, 0.3, 0.1)
    more: tuple[float, ...] = (0.8, 0.7, 0.2, 0.05, 0.02)
    seeds: tuple[int, ...] = (1000, 1001, 1002)
    patience: float = 1.5
    compile: bool = True

    def start(self, case: Case, beta: float) -> float:
        """The gamma at which the search of one case and beta begins."""
        wanted = case.start / beta**case.power
        return min(self.lrs, key=lambda lr: abs(math.log(lr / wanted)))


@dataclass(frozen=True)
class Found:
    """The file of one case and beta: the cells in the order in which they were tried."""

    cells: tuple[Choice, ...]


def search(demo: Demo, grid: Search, run_dir: Path, jobs: int, resume: bool) -> Tuned:
    """Search all cases, and write ``tuned.json``; each case and beta is stored once it is known.

    Raises:
        ValueError: for a folder of another search; where a best gamma or beta is at the end of its grid.
    """
    plan = {"demo": asdict(demo), "search": asdict(grid)}
    with RunDirectory(run_dir, plan, free=("demo.seeds",), resume=resume) as run:
        run.write_config()
        (run_dir / "runs").mkdir(exist_ok=True)
        while missing := [
            (demo, grid, case, beta, run_dir)
            for case in demo.cases
            for beta in _betas(run_dir, case, grid)
            if not _place(run_dir, case, beta).exists()
        ]:
            places = [_place(run_dir, case, beta) for _, _, case, beta, _ in missing]
            run_in_processes(
                search_lrs_of, missing, jobs, "search", steps=Steps(len(places), partial(_existing, places), "beta")
            )
        cells = {case.name: _cells(run_dir, case, _betas(run_dir, case, grid)) for case in demo.cases}
        best = {name: _best_of_both(name, tried, grid) for name, tried in cells.items()}
        kept = {name: tuple(map(_choice, tried)) for name, tried in cells.items()}
        machine = {name: value for name, value in environment().items() if name != "command"}
        result = Tuned(COMMAND, machine, json.loads(json.dumps(asdict(grid))), kept, best)
        write_atomically(run_dir / "tuned.json", (json.dumps(asdict(result), indent=1) + "\n").encode())
    return result


def _place(run_dir: Path, case: Case, beta: float) -> Path:
    return run_dir / "runs" / f"{case.name}-beta{beta:g}.json"


def _existing(places: Sequence[Path]) -> int:
    return sum(place.exists() for place in places)


class _Bench(NamedTuple):
    """The settings of `SinusoidBench`."""

    workers: int
    inner_lr: float
    target: float
    every: int
    validation: int
    compile: bool


def search_lrs_of(demo: Demo, grid: Search, case: Case, beta: float, run_dir: Path) -> None:
    """Search the step sizes of one case and beta, and store them."""
    keep_freed_memory()
    torch.set_num_threads(1)
    bench = SinusoidBench(_Bench(case.workers, demo.inner_lr, demo.target, demo.every, demo.validation, grid.compile))
    failed: set[float] = set()

    def run(lr: float, beta: float, seed: int, cap: int) -> float:
        if lr in failed:  # on a seed before: the mean is infinite
            return math.inf
        steps = bench.run(case.tasks, case.bias, lr, beta, seed, cap)
        if not math.isfinite(steps):
            failed.add(lr)
        return steps

    cells = search_lrs(
        run, grid.lrs, beta, first=grid.start(case, beta), seeds=grid.seeds, cap=case.cap, patience=grid.patience,
        tries=1, over=fmean,
    )  # fmt: skip
    found = Found(tuple(map(_choice, cells)))
    write_atomically(_place(run_dir, case, beta), json.dumps(asdict(found)).encode())


def _betas(run_dir: Path, case: Case, grid: Search) -> list[float]:
    """The betas to search: those of the grid, and further ones as long as the best is at the end of them."""
    betas = list(grid.betas)
    while all(_place(run_dir, case, beta).exists() for beta in betas):
        more = _beyond(_cells(run_dir, case, betas), betas, grid)
        if not more:
            break
        betas += more
    return betas


def _choice(cell: Cell) -> Choice:
    return Choice(cell.lr, cell.beta, cell.steps if math.isfinite(cell.steps) else None)


def _cells(run_dir: Path, case: Case, betas: Sequence[float]) -> list[Cell]:
    files = [read_record(Found, _place(run_dir, case, beta)) for beta in sorted(betas, reverse=True)]
    return [Cell(at.lr, at.beta, math.inf if at.steps is None else at.steps) for file in files for at in file.cells]


def _beyond(cells: Sequence[Cell], betas: Sequence[float], grid: Search) -> list[float]:
    """The next beta, where momentum's best is at the end of those that were searched."""
    tried = sorted(beta for beta in betas if beta < 1)
    best = min((cell for cell in cells if cell.beta < 1), key=lambda cell: cell.steps).beta
    if best == tried[0]:
        return sorted((beta for beta in grid.more if beta < best), reverse=True)[:1]
    return sorted(beta for beta in grid.more if beta > best)[:1] if best == tried[-1] else []


def _best_of_both(name: str, cells: Sequence[Cell], grid: Search) -> dict[str, Choice]:
    """The fastest of each method.

    Raises:
        ValueError: if a method never reached the target, or is fastest at the end of the grid.
    """
    betas = {cell.beta for cell in cells if cell.beta < 1}
    found: dict[str, Choice] = {}
    for method in METHODS:
        best = min((cell for cell in cells if (cell.beta == 1) == (method == "sgd")), key=lambda cell: cell.steps)
        if not math.isfinite(best.steps):
            raise ValueError(f"case {name}: {METHODS[method]} never reached the target. Raise the cap or the target.")
        if best.lr in (grid.lrs[0], grid.lrs[-1]) or (method == "momentum" and best.beta == min(betas)):
            raise ValueError(
                f"case {name}: {METHODS[method]} is fastest at γ = {best.lr:g}, β = {best.beta:g}, the end of the "
                "grid. Extend it."
            )
        found[method] = _choice(best)
    return found


def search_table(demo: Demo, result: Tuned) -> list[str]:
    """For each case, beta and method, the best step size and its neighbours: the search in Markdown.

    A dash stands for a step size at which a seed took more than ``patience`` times the best, or did not arrive.
    """
    lines = tables.head("case", "method", "β", "best γ", "steps", "steps at γ/√2", "at √2 γ")
    for case in demo.cases:
        tried = result.cells[case.name]
        for beta in dict.fromkeys(cell.beta for cell in tried):
            steps = {cell.lr: cell.steps or math.inf for cell in tried if cell.beta == beta}
            lr = min(steps, key=steps.__getitem__)
            known = [*result.search["lrs"]]
            at = known.index(lr)
            beside = [steps.get(known[i], math.nan) if 0 <= i < len(known) else math.nan for i in (at - 1, at + 1)]
            method: Method = "sgd" if beta == 1 else "momentum"
            chosen = result.best[case.name][method]
            mark = "**" if (chosen.lr, chosen.beta) == (lr, beta) else ""
            cells = [f"{mark}{beta:g}{mark}", f"{mark}{lr:g}{mark}", *(_shown(n) for n in (steps[lr], *beside))]
            lines.append(tables.row(f"({case.name}) {case.title}", METHODS[method], *cells))
    return lines


def _shown(steps: float) -> str:
    return "not run" if math.isnan(steps) else f"{steps:.0f}" if math.isfinite(steps) else "–"
