"""Validation error of runs on Omniglot during training, with the published errors as lines."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from metamom.experiments.published.outcome import Outcome
from metamom.experiments.published.recipes import ROWS
from metamom.experiments.published.report import OPTIMIZER_NAMES, record
from metamom.experiments.shared.figures import COLOURS, DASHES, row_of_panels, save
from metamom.training.directory import read_metrics

TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)  # per cent


def omniglot_figure(path: Path, runs: Iterable[tuple[Path, Outcome]]) -> None:
    """Draw validation error against training tasks, a panel for each row of the table.

    Args:
        path: the PNG.
        runs: run directories on Omniglot with their outcomes.
    """
    by_row: dict[str, list[tuple[Path, Outcome]]] = {}
    for run, outcome in runs:
        by_row.setdefault(str(outcome.row), []).append((run, outcome))
    rows = [row for row in ROWS if row in by_row]
    figure, panels = row_of_panels(len(rows))
    styles: dict[str, tuple[str, str]] = {}  # the same in all panels
    for panel, row in zip(panels, rows, strict=True):
        marked: set[str] = set()  # methods, and published figures
        for (run, outcome), label in zip(by_row[row], labels([each for _, each in by_row[row]]), strict=True):
            colour, dash = styles.setdefault(label, (COLOURS[len(styles) % 6], DASHES[len(styles) % 4]))
            tasks, errors = validations(run, outcome.meta_batch)
            panel.plot(tasks, errors, color=colour, linestyle=dash, label=None if label in marked else label)
            marked.add(label)
            published = record(outcome).figures.get(row)
            title = f"{record(outcome).title}, published"
            if published is not None and title not in marked:
                panel.axhline(100 - published.mean, color=colour, linestyle=":", label=title)
                marked.add(title)
        ways, shots = ROWS[row]
        panel.set(title=f"{ways}-way {shots}-shot", xlabel="training tasks, thousands", yscale="log")
        panel.legend(frameon=False)
    ticks = [tick for tick in TICKS if tick > panels[0].get_ylim()[0]]  # others would widen the axis
    for panel in panels:
        panel.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        panel.minorticks_off()
    panels[0].set_ylabel("validation error, %")
    save(figure, path)


def labels(outcomes: Sequence[Outcome]) -> list[str]:
    """The names of runs in a legend: seeds share one, and runs of other lengths do not."""
    methods = [f"{record(each).title}, {OPTIMIZER_NAMES[each.optimizer]} {each.lr:g}" for each in outcomes]
    lengths: dict[str, set[int]] = {}
    for method, outcome in zip(methods, outcomes, strict=True):
        lengths.setdefault(method, set()).add(outcome.iterations)
    return [
        method if len(lengths[method]) == 1 else f"{method}, {outcome.iterations:,} iterations"
        for method, outcome in zip(methods, outcomes, strict=True)
    ]


def validations(run: Path, meta_batch: int) -> tuple[list[float], list[float]]:
    """The thousands of training tasks before each validation of a run, and its error in per cent."""
    lines = [line for line in read_metrics(run) if not math.isnan(line.get("validation", math.nan))]
    tasks = [(line["step"] + 1) * meta_batch / 1000 for line in lines]
    return tasks, [100 - 100 * line["validation"] for line in lines]
