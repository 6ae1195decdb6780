"""Two figures: measured steps against the number of processes, and where compression pays off by the model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

from metamom.distributed import SERVERS, Server
from metamom.experiments.scaling.planning import LINKS, WORKERS, Case, network
from metamom.experiments.shared.figures import COLOURS, DASHES, save

SAID: dict[Server, str] = {"replicated": "server: everybody", "rank0": "server: process 0"}
WAYS: dict[str, tuple[Server, bool]] = {  # server, and whether collectives go along a tree
    "everybody, in a ring": ("replicated", False),
    "everybody, along a tree": ("replicated", True),
    "process 0, in a ring": ("rank0", False),
}


def measured(path: Path, cells: Sequence[dict[str, Any]]) -> None:
    """Plot milliseconds of a step against processes, with quartiles: problems in rows, scaling in columns."""
    problems = list(dict.fromkeys(cell["problem"] for cell in cells))
    figure, panels = _grid(len(problems), 2)
    for row, problem in zip(panels, problems, strict=True):
        for panel, scaling in zip(row, ("strong", "weak"), strict=True):
            those = [cell for cell in cells if (cell["problem"], cell["scaling"]) == (problem, scaling)]
            _scaling(panel, those)
            first = those[0]
            tasks = first["tasks"] * (first["processes"] if scaling == "strong" else 1)
            panel.set_title(f"{problem}, {scaling}: {tasks} tasks{'' if scaling == 'strong' else ' a process'}")
        row[0].set_ylabel("ms a step")
    for panel in panels[-1]:
        panel.set_xlabel("processes")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    save(figure, path)


def _scaling(panel: Axes, cells: Sequence[dict[str, Any]]) -> None:
    processes = sorted({cell["processes"] for cell in cells})
    specs = list(dict.fromkeys(cell["operator"] for cell in cells))
    for number, (spec, server) in enumerate((spec, server) for server in SERVERS for spec in specs):
        found = {
            cell["processes"]: 1e3 * np.percentile(cell["seconds"], [25, 50, 75])
            for cell in cells
            if cell["operator"] == spec and (cell["server"] == server or cell["processes"] == 1)
        }
        low, middle, high = np.array([found[n] for n in processes]).T
        beside = np.array(processes) * 1.015 ** (number - len(specs))  # overlapping error bars would be unreadable
        colour, dash = COLOURS[number % len(specs) % 6], DASHES[number // len(specs)]
        panel.plot(beside, middle, dash, color=colour, marker="o", markersize=3, label=f"{spec}, {SAID[server]}")
        panel.vlines(beside, low, high, color=colour, linewidth=0.8)
    first = min((cell for cell in cells if cell["operator"] == specs[0]), key=lambda cell: int(cell["processes"]))
    start = 1e3 * float(np.median(first["seconds"]))
    ideal = [start * processes[0] / n if first["scaling"] == "strong" else start for n in processes]
    panel.plot(processes, ideal, ":", color="black", linewidth=1, label="ideal, a core each")
    panel.set(ylim=(0, None), xscale="log")
    panel.xaxis.set_major_locator(FixedLocator(processes))
    panel.xaxis.set_major_formatter(ScalarFormatter())
    panel.xaxis.set_minor_locator(NullLocator())


def pays(path: Path, case: Case, latency: float) -> None:
    """Plot a step's speed relative to a dense all-reduce: servers and collectives in rows, two links in columns."""
    links = (min(LINKS), max(LINKS))
    figure, panels = _grid(len(WAYS), len(links))
    for row, (way, (server, tree)) in zip(panels, WAYS.items(), strict=True):
        for panel, gigabits in zip(row, links, strict=True):
            link = network(gigabits, latency)
            for number, spec in enumerate(case.kinds):
                if spec == "none" and server == "replicated":
                    continue
                colour = "0.45" if spec == "none" else COLOURS[(number - 1) % 6]
                values = [case.speedup(n, spec, server, link, tree=tree) for n in WORKERS[1:]]
                # thin curves on top, so that all show where they overlap
                (curve,) = panel.plot(WORKERS[1:], values, DASHES[number % 4], color=colour, label=spec)
                curve.set(linewidth=1 + 0.4 * number, zorder=3 - 0.1 * number)
            panel.axhline(1.0, color="black", linewidth=0.8)
            panel.set(xscale="log", yscale="log")
            panel.xaxis.set_minor_locator(NullLocator())
            panel.yaxis.set_minor_locator(NullLocator())
            panel.set_title(f"{gigabits} Gbit/s; {way}")
        row[0].set_ylabel("× as fast as dense")
        _same_scale(row)
    for panel in panels[-1]:
        panel.set_xlabel("workers, a process each")
    figure.suptitle(f"{case.name}: d = {case.entries:,}, {case.tasks} tasks a worker, latency {1e6 * latency:g} µs")
    figure.legend(*panels[-1][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    save(figure, path)


def _same_scale(row: Sequence[Axes]) -> None:
    """Use the same scale in all panels, with ticks at powers of ten, or of two for a small range."""
    low = min(panel.get_ylim()[0] for panel in row)
    high = max(panel.get_ylim()[1] for panel in row)
    base = 10.0 if high / low >= 50 else 2.0
    powers = np.arange(np.ceil(np.log(low) / np.log(base)), np.floor(np.log(high) / np.log(base)) + 1)
    marks = [base**power for power in powers]
    for panel in row:
        panel.set_ylim(low, high)
        panel.yaxis.set_major_locator(FixedLocator(marks))
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")


def _grid(rows: int, columns: int) -> tuple[Figure, list[list[Axes]]]:
    """Like `figures.row_of_panels`, in several rows."""
    figure = Figure(figsize=(3.6 * columns, 2.9 * rows + 1.2), layout="constrained")
    panels = [[figure.add_subplot(rows, columns, columns * i + j + 1) for j in range(columns)] for i in range(rows)]
    for row in panels:
        for panel in row:
            panel.spines[["top", "right"]].set_visible(False)
            panel.grid(alpha=0.25)
    return figure, panels
