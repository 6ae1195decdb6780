"""The tables, made from the finished cells, and ``leaderboard.json`` with all of them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from metamom.common import tables
from metamom.common.files import write_atomically
from metamom.experiments.leaderboard.laws import composite_floor, law
from metamom.experiments.leaderboard.methods import METHODS, Method
from metamom.experiments.leaderboard.picture import picture
from metamom.experiments.leaderboard.problems import Problem
from metamom.experiments.leaderboard.regressions import Regressions
from metamom.experiments.leaderboard.results import Cell, cells, path_of, table_of
from metamom.experiments.leaderboard.running import readings
from metamom.experiments.leaderboard.suite import PROBLEMS, Plan


class Column(NamedTuple):
    """One of the tables: its title, the cells' question, the fields of its mean and half-width, and their unit."""

    title: str
    question: str
    fields: tuple[str, str] = ("mean", "halfwidth")
    unit: float = 1.0


COLUMNS = (
    Column("Error after all steps", "steps"),
    Column("Error after the bytes of as many messages of 1 %", "bytes"),
    Column("Steps to the target", "target"),
    Column("KB of a worker to the target", "target", ("bytes", "bytes_halfwidth"), 1000.0),
)
Cells = Mapping[tuple[str, str], Cell]


def report(out: Path, plan: Plan) -> Path:
    """Write ``leaderboard.json``, ``figures/leaderboard.png`` and ``report.md`` from the cells that are finished."""
    found = table_of(out, plan)
    rows = [{"method": method, **cell} for (_, method), cell in found.items()]
    write_atomically(out / "leaderboard.json", (json.dumps(rows, indent=1, ensure_ascii=False) + "\n").encode())
    picture(out / "figures" / "leaderboard.png", found)
    every = list(cells())
    done = sum(path_of(out, problem, setup).exists() for problem, setup in every)
    steps = ", ".join(f"{plan.on(problem).steps} ({problem.title})" for problem in PROBLEMS.values())
    targets = ", ".join(f"{problem.target:g} ({problem.title})" for problem in PROBLEMS.values())
    lines = [
        "# The leaderboard",
        "",
        f"{done} of {len(every)} cells are finished. γ from {_powers(plan)}, chosen for each entry by",
        f"{plan.search_seeds} seeds; {plan.seeds} other seeds measure it. ± is a 95 % interval over these. In bold:",
        "means within the interval of the best of the column. –: not a tenth better than the start, or never at the",
        "target. *: the best γ is at an end of the grid. Errors are ‖∇f‖² over its start, on sinusoids the loss.",
        f"Targets: {targets}. Steps: {steps}.",
    ]
    for column in COLUMNS:
        lines += ["", f"## {column.title}", "", *_table(found, column)]
    lines += ["", "## Exact laws", "", *laws(found, plan), ""]
    lines += ["![Steps and bytes to the target](figures/leaderboard.png)"]
    write_atomically(out / "report.md", ("\n".join(lines) + "\n").encode())
    return out / "report.md"


def shown(cell: Cell, column: Column) -> str:
    """An entry: mean ± half-width, how many seeds have the target, or a dash."""
    found = cell[column.question]
    if found is None or found["finite"] == 0:
        return "–"
    if column.question == "target" and found["finite"] < found["seeds"]:
        return f"{found['finite']} of {found['seeds']}"
    if found["mean"] is None or (column.question != "target" and not found["mean"] < 0.9 * cell["start"]):
        return "–"
    unit = column.unit * (1.0 if column.question == "target" else PROBLEMS[cell["problem"]].unit)
    mean, half = (found[name] / unit for name in column.fields)
    return f"{number(mean, half)}{'*' * found['edge']}"


def number(mean: float, halfwidth: float) -> str:
    """``mean ± halfwidth``, both to the half-width's first digit, or to whole numbers."""
    if halfwidth == 0 or not math.isfinite(halfwidth):
        return f"{mean:.4g}"
    digits = max(0, -math.floor(math.log10(halfwidth)))
    return f"{mean:.{digits}f} ± {halfwidth:.{digits}f}"


def _table(found: Cells, column: Column) -> list[str]:
    signs = [problem.sign * (column.question != "target") for problem in PROBLEMS.values()]
    titles = [f"{problem.title}{sign}" for problem, sign in zip(PROBLEMS.values(), signs, strict=True)]
    lines = tables.head("method", *titles)
    best = {name: _best(found, name, column) for name in PROBLEMS}
    for method in METHODS:
        row = []
        for name, problem in PROBLEMS.items():
            cell = found.get((name, method.name))
            text = "" if cell is None else shown(cell, column)
            wins = cell is not None and text != "–" and _ends(cell, column)[0] <= best[name]
            row.append(same_as(method, problem) or (f"**{text}**" if wins else text))
        lines.append(tables.row(method.name, *row))
    return lines


def same_as(method: Method, problem: Problem) -> str:
    """Which earlier method this one is on a problem, if any: ``= SGD``."""
    setup = method.on(problem.operator, problem.clips)
    for each in METHODS:
        if each is method:
            return ""
        if each.on(problem.operator, problem.clips) == setup:
            return f"= {each.name}"
    return ""


def _ends(cell: Cell, column: Column) -> tuple[float, float]:
    """An entry's mean and the upper end of its interval; infinite if it has none."""
    found, (mean, half) = cell[column.question], column.fields
    if found is None or found[mean] is None:
        return math.inf, math.inf
    return found[mean], found[mean] + found[half]


def _best(found: Cells, problem: str, column: Column) -> float:
    """The upper end of the interval of a column's smallest mean; below every entry, if none has a mean."""
    low, high = min(
        (_ends(cell, column) for (name, _), cell in found.items() if name == problem), default=(math.inf,) * 2
    )
    return high if math.isfinite(low) else -math.inf


def laws(found: Cells, plan: Plan) -> list[str]:
    """Measured errors of whole gradients against their exact laws."""
    lines = tables.head("problem", "method", "γ", "measured, ‰", "law, ‰")
    for (name, method), cell in found.items():
        problem, entry = PROBLEMS[name], cell["steps"]
        setup = next(m for m in METHODS if m.name == method).on(problem.operator, problem.clips)
        if entry is None or entry["mean"] is None or same_as(next(m for m in METHODS if m.name == method), problem):
            continue
        steps = plan.on(problem).steps
        value = law(problem, setup, entry["lr"], steps, max(1, round(plan.last * readings(problem, steps))))
        if value is not None:
            lines.append(
                tables.row(
                    problem.title, method, f"{entry['lr']:g}", shown(cell, COLUMNS[0]), f"{value / problem.unit:.3g}"
                )
            )
    floor = next(composite_floor(problem) for problem in PROBLEMS.values() if isinstance(problem, Regressions))
    return [
        *lines,
        "",
        f"Regressions: at the mean iterate of whole gradients the error is {1000 * floor:.3g} ‰, for every β.",
    ]


def _powers(plan: Plan) -> str:
    return f"{plan.lrs[0]:g} to {plan.lrs[-1]:g} by factors of {plan.lrs[1] / plan.lrs[0]:g}"
