"""The demo's figure: error against steps, a panel for each case."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from metamom.experiments.demo.settings import METHODS, Demo
from metamom.experiments.demo.training import Arm, curve, ending
from metamom.experiments.shared.figures import COLOURS, DASHES, column_of_panels, save

LOWEST, HIGHEST = 0.8, 5.0  # errors shown, as multiples of the target


def draw(path: Path, demo: Demo, arms: Sequence[Arm], run_dir: Path) -> None:
    """Plot each method's median and range over the seeds until its first seed arrives, and every seed's arrival."""
    figure, panels = column_of_panels(len(demo.cases))
    for panel, case in zip(panels, demo.cases, strict=True):
        for number, (method, label) in enumerate(METHODS.items()):
            _arm(panel, number, label, demo, [arm for arm in arms if (arm.case, arm.method) == (case, method)], run_dir)
        panel.axhline(demo.target, color="0.5", linewidth=0.8, zorder=0)
        panel.set(xlabel="step", title=f"({case.name}) {case.title}", xlim=(0, None))
        panel.set(yscale="log", ylim=(LOWEST * demo.target, HIGHEST * demo.target), ylabel="validation error")
        panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 5.0)))
        panel.yaxis.set_major_formatter(ScalarFormatter())
        panel.yaxis.set_minor_formatter(NullFormatter())
    panels[0].legend(frameon=False)
    save(figure, path)


def _arm(panel: Axes, number: int, label: str, demo: Demo, arms: Sequence[Arm], run_dir: Path) -> None:
    curves = [dict(curve(arm, run_dir)) for arm in arms]
    steps = sorted(set.intersection(*(set(each) for each in curves)))
    values = np.array([[each[step] for step in steps] for each in curves])
    colour = COLOURS[number]
    if steps:
        panel.plot(steps, np.median(values, 0), color=colour, linestyle=DASHES[number], label=label)
        panel.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.2, linewidth=0)
    ends = [end.steps for arm in arms if (end := ending(arm, run_dir)) is not None and end.steps is not None]
    panel.plot(ends, [demo.target] * len(ends), "os"[number], color=colour, markersize=5, clip_on=False, alpha=0.8)
