"""The picture: steps and bytes to the target, of every method on every problem, relative to the best."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from metamom.experiments.leaderboard.methods import METHODS
from metamom.experiments.leaderboard.results import Cell
from metamom.experiments.leaderboard.suite import PROBLEMS
from metamom.experiments.shared.figures import save

WORST = 100.0  # times the best of a column, where the colours end


def values(found: Mapping[tuple[str, str], Cell], field: str) -> npt.NDArray[np.float64]:
    """``[methods, problems]`` means to the target, ``mean`` steps or ``bytes``; infinite where a seed never has it."""
    out = np.full((len(METHODS), len(PROBLEMS)), math.inf)
    for i, method in enumerate(METHODS):
        for j, problem in enumerate(PROBLEMS):
            entry = found.get((problem, method.name), {}).get("target")
            if entry is not None and entry[field] is not None:
                out[i, j] = entry[field]
    return out


def picture(path: Path, found: Mapping[tuple[str, str], Cell]) -> None:
    """Draw two heat maps next to each other: steps, and KB that a worker sends; the darker, the nearer to the best."""
    figure = Figure(figsize=(15, 0.36 * len(METHODS) + 2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _map(left, values(found, "mean"), "steps to the target", 1)
    _map(right, values(found, "bytes"), "KB of a worker to the target", 1000)
    left.set_yticks(range(len(METHODS)), [method.name for method in METHODS])
    save(figure, path)


def _map(panel: Axes, found: npt.NDArray[np.float64], title: str, unit: float) -> None:
    lowest = found.min(0)
    ratio = np.where(np.isfinite(found), found / np.where(np.isfinite(lowest), lowest, 1), np.nan)
    panel.imshow(np.log10(np.maximum(ratio, 1)), cmap="viridis", aspect="auto", vmin=0, vmax=math.log10(WORST))
    for (i, j), value in np.ndenumerate(found):
        text = "–" if not np.isfinite(value) else f"{value / unit:.0f}" if value >= 10 * unit else f"{value / unit:.2g}"
        bright = np.isfinite(value) and ratio[i, j] < math.sqrt(WORST)
        panel.text(j, i, text, ha="center", va="center", color="white" if bright else "black")
    panel.set_xticks(range(len(PROBLEMS)), [problem.title for problem in PROBLEMS.values()], rotation=30, ha="right")
    panel.set_title(title)
    kinds = [method.kind for method in METHODS]
    for i in range(1, len(kinds)):
        if kinds[i] != kinds[i - 1]:
            panel.axhline(i - 0.5, color="black", linewidth=1.2)
