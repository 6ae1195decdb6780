"""Figures: learning curves, step sizes, heat maps, and one task before and after adaptation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from metamom.batch import TaskBatch
from metamom.common.files import replacing
from metamom.experiments.shared.numerals import distinguishable, shortest
from metamom.maml.learner import MAML

# Okabe and Ito's colours, which colour-blind readers can distinguish; lines also differ in dashes.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("-", "--", "-.", ":")

SMALLEST = 10  # points

Curve = list[tuple[int, float]]


def learning_curves(
    path: Path, arms: Mapping[str, Sequence[Curve]], *, ylabel: str, title: str, target: float, log: bool
) -> None:
    """Plot validation against iterations: for each arm the mean over its seeds, in a band from lowest to highest.

    Args:
        path: the PNG.
        arms: for each label its seeds' curves ``[(iteration, value)]``; iterations missing in one are left out.
        ylabel: label of the values.
        title: of the figure.
        target: marked by a thin line.
        log: whether the value axis is logarithmic.
    """
    figure, axes = row_of_panels(1)
    for number, (label, curves) in enumerate(arms.items()):
        if not curves:
            axes[0].plot([], [], color=COLOURS[number % 6], label=f"{label} (all diverged)")
            continue
        by_iteration = [dict(curve) for curve in curves]
        iterations = [i for i, _ in curves[0] if all(i in curve for curve in by_iteration)]
        values = np.array([[curve[i] for i in iterations] for curve in by_iteration])
        colour, dash = COLOURS[number % 6], DASHES[number % 4]
        axes[0].plot(iterations, values.mean(0), color=colour, linestyle=dash, label=label)
        if len(curves) > 1:
            axes[0].fill_between(iterations, values.min(0), values.max(0), color=colour, alpha=0.2, linewidth=0)
    axes[0].axhline(target, color="0.5", linewidth=0.8)
    axes[0].annotate(
        f"target {shortest(target)}", (1, target), xycoords=("axes fraction", "data"), xytext=(-4, 3),
        textcoords="offset points", ha="right", fontsize=8, color="0.35",
    )  # fmt: skip
    axes[0].set(xlabel="iteration", ylabel=ylabel, title=title)
    if log:
        axes[0].set_yscale("log")
        axes[0].yaxis.set_major_formatter(ScalarFormatter())
        axes[0].yaxis.set_minor_formatter(NullFormatter())
        axes[0].yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 5.0)))
    axes[0].legend(frameon=False)
    save(figure, path)


def step_sizes(path: Path, arms: Mapping[str, Mapping[float, Sequence[float]]], *, ylabel: str, title: str) -> None:
    """Plot final validation against the step size, a point for each seed and a line through their means.

    Args:
        path: the PNG.
        arms: for each label and step size, the values of the runs that did not diverge.
        ylabel: label of the values.
        title: of the figure.
    """
    figure, axes = row_of_panels(1)
    for number, (label, by_lr) in enumerate(arms.items()):
        colour, dash = COLOURS[number % 6], DASHES[number % 4]
        reached = {lr: values for lr, values in sorted(by_lr.items()) if values}
        means = [float(np.mean(values)) for values in reached.values()]
        axes[0].plot(list(reached), means, color=colour, linestyle=dash, label=label)
        for lr, values in reached.items():
            axes[0].plot([lr] * len(values), values, "o", color=colour, markersize=4)
    axes[0].set(xlabel="step size γ", ylabel=ylabel, title=title, xscale="log")
    axes[0].legend(frameon=False)
    save(figure, path)


def adaptation(
    path: Path,
    learners: Mapping[str, MAML],
    batch: TaskBatch,
    truth: tuple[torch.Tensor, torch.Tensor],
    steps: Sequence[int],
) -> None:
    """Plot one task: each learner's curve before and after adaptation, against the truth.

    Args:
        path: the PNG.
        learners: by label, one panel each.
        batch: the task, alone in its batch.
        truth: points of its true function, ``x [N]`` and ``y [N]``.
        steps: numbers of inner steps, one line each.
    """
    x, truth_y = truth
    figure, axes = row_of_panels(len(learners))
    for panel, (label, learner) in zip(axes, learners.items(), strict=True):
        panel.plot(x, truth_y, color="black", linewidth=2, label="truth")
        shades = np.linspace(0.75, 0.0, len(steps))
        for step, params in enumerate(learner.trajectory(batch.support_x, batch.support_y, steps=max(steps))):
            if step not in steps:
                continue
            with torch.no_grad():
                y = learner.predict(params, x[None, :, None])[0, :, 0]
            number = list(steps).index(step)
            colour = (0.84, 0.2 + 0.6 * float(shades[number]), 0.8 * float(shades[number]))
            name = "before adaptation" if step == 0 else f"after {step} step{'s' if step > 1 else ''}"
            panel.plot(x, y, color=colour, linestyle=(":", "--", "-.", "-")[number % 4], label=name)
        panel.plot(batch.support_x[0], batch.support_y[0], "^", color="#0072B2", label="support points")
        panel.set(xlabel="x", title=label)
    axes[0].set_ylabel("y")
    axes[-1].legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    save(figure, path)


def heat_map(
    panel: Axes,
    rows: Sequence[float],
    columns: Sequence[float],
    values: npt.NDArray[np.float64],
    *,
    best: Sequence[tuple[int, int]] = (),
    log: bool = True,
) -> None:
    """Draw a heat map of values, with each value written into its field, infinite ones as a dash.

    Args:
        panel: the axes to draw in.
        rows: labels of the rows.
        columns: labels of the columns.
        values: ``[rows, columns]``; small values are good, and dark.
        best: the fields ``(row, column)`` to frame.
        log: whether colours follow the logarithm, for values > 0; else they span 0 to 1, for fractions.
    """
    shown = np.where(np.isfinite(values), values, np.nan)
    shade = np.log10(shown) if log else shown
    vmin, vmax = (None, None) if log else (0.0, 1.0)
    image = panel.imshow(shade, cmap="viridis", aspect="auto", origin="lower", vmin=vmin, vmax=vmax)
    low, high = image.get_clim()
    for (i, j), value in np.ndenumerate(shown):
        dark = np.isfinite(value) and shade[i, j] <= (low + high) / 2
        text = "–" if not np.isfinite(value) else f"{value:.0f}" if value >= 10 else f"{value:.2g}"
        panel.text(j, i, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")
    for i, j in best:
        panel.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, fill=False, edgecolor="#D55E00", linewidth=2))
    panel.set_xticks(range(len(columns)), distinguishable(columns))
    panel.set_yticks(range(len(rows)), distinguishable(rows))


def column_of_panels(count: int) -> tuple[Figure, list[Axes]]:
    """Panels below each other, which can still be read on a phone, where three side by side cannot."""
    figure = Figure(figsize=(6.5, 4 * count), layout="constrained")
    axes = [figure.add_subplot(count, 1, i + 1) for i in range(count)]
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25)
    return figure, axes


def row_of_panels(count: int, *, sharey: bool = True) -> tuple[Figure, list[Axes]]:
    """A figure without pyplot, which needs no window system and keeps no global state."""
    figure = Figure(figsize=(7 if count == 1 else 4.2 * count + 1.6, 4.2), layout="constrained")
    axes = [figure.add_subplot(1, count, 1)]
    axes += [figure.add_subplot(1, count, i + 1, sharey=axes[0] if sharey else None) for i in range(1, count)]
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25)
    return figure, axes


def save(figure: Figure, path: Path) -> None:
    """Write a PNG with no text below `SMALLEST`, and create its folder."""
    for text in figure.findobj():
        if isinstance(text, Text):
            text.set_fontsize(max(SMALLEST, text.get_fontsize()))
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
