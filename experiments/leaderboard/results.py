"""Finished cells on disk: a JSON file each, which a resumed run keeps."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from metamom.common.files import write_atomically
from metamom.experiments.leaderboard.methods import METHODS, Setup
from metamom.experiments.leaderboard.problems import Problem
from metamom.experiments.leaderboard.suite import PROBLEMS, Plan

Cell = dict[str, Any]


def cells() -> Iterator[tuple[Problem, Setup]]:
    """All cells to run; methods that are the same on a problem share one."""
    for problem in PROBLEMS.values():
        yield from ((problem, setup) for setup in dict.fromkeys(m.on(problem.operator, problem.clips) for m in METHODS))


def path_of(out: Path, problem: Problem, setup: Setup) -> Path:
    """Where a cell is kept."""
    return out / "cells" / problem.name / f"{setup.slug}.json"


def kept(out: Path, problem: Problem, setup: Setup, plan: Plan) -> Cell | None:
    """A finished cell, or ``None``.

    Raises:
        ValueError: if it was measured with another plan or problem, or the file is damaged.
    """
    path = path_of(out, problem, setup)
    if not path.exists():
        return None
    try:
        cell: Cell = json.loads(path.read_text(encoding="utf-8"))
        settings = cell["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}): delete it, or take another --out.") from None
    if settings != settings_of(problem, plan):
        raise ValueError(
            f"{path} was measured with other settings than this run's (--quick, --seeds, or a problem that has "
            "changed): take another --out, or delete it."
        )
    return cell


def keep(out: Path, problem: Problem, setup: Setup, plan: Plan, cell: Cell) -> None:
    """Write a finished cell."""
    path = path_of(out, problem, setup)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**cell, "settings": settings_of(problem, plan)}, indent=1, ensure_ascii=False)
    write_atomically(path, (text + "\n").encode())


def settings_of(problem: Problem, plan: Plan) -> dict[str, Any]:
    """What a cell's numbers depend on, as JSON has it."""
    settings = {"plan": asdict(plan), "problem": asdict(problem)}  # type: ignore[call-overload]
    read: dict[str, Any] = json.loads(json.dumps(settings))
    return read


def table_of(out: Path, plan: Plan) -> dict[tuple[str, str], Cell]:
    """The finished cells by problem and method's name."""
    found = {}
    for problem in PROBLEMS.values():
        for method in METHODS:
            cell = kept(out, problem, method.on(problem.operator, problem.clips), plan)
            if cell is not None:
                found[problem.name, method.name] = cell
    return found
