"""Measure the cells that are not there yet, alone or as one of several processes."""

from __future__ import annotations

from pathlib import Path

from tqdm import tqdm

from metamom.experiments.leaderboard.cell import measure
from metamom.experiments.leaderboard.results import cells, keep, kept
from metamom.experiments.leaderboard.suite import Plan


def finish(out: Path, plan: Plan, share: int, shares: int) -> None:
    """Measure every ``shares``-th cell, beginning with number ``share``, unless it is finished."""
    for problem, setup in tqdm(list(cells())[share::shares], desc=f"cells {share + 1} of {shares}", disable=None):
        if kept(out, problem, setup, plan) is None:
            keep(out, problem, setup, plan, measure(problem, setup, plan))
