"""Outcomes next to the published figures: the lines that a run prints, tables in Markdown, and the sinusoid figure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from metamom.common import tables
from metamom.common.intervals import student_halfwidth
from metamom.common.numbers import counted
from metamom.experiments.published.outcome import DIVERGED, WITHIN, Measurement, Outcome
from metamom.experiments.published.recipes import OMNIGLOT, ROWS, SINUSOID, Published
from metamom.experiments.shared.figures import COLOURS, DASHES, row_of_panels, save

OPTIMIZER_NAMES = {"adam": "Adam", "sgd": "plain meta-SGD", "composite": "momentum"}
STATISTICS = {"batch": "transductive", "support": "inductive"}
SHOTS = (5, 10)  # the panels of the sinusoid figure
SHOWN_STEPS = (0, 1, 5, 10)  # of the sinusoid table
TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1, 2, 3, 5)  # of the sinusoid figure


def title(outcome: Outcome) -> str:
    """The task, method and length of a run in a line."""
    published = record(outcome)
    if outcome.row is None:
        task = f"sinusoids, trained with {outcome.shots} shots"
    else:
        task = f"Omniglot, {ROWS[outcome.row].ways}-way {ROWS[outcome.row].shots}-shot"
    return (
        f"{published.title} on {task}: {counted(outcome.iterations, 'iteration')} of {outcome.meta_batch} tasks with "
        f"{OPTIMIZER_NAMES[outcome.optimizer]}, γ = {outcome.lr:g}, seed {outcome.seed}, {outcome.minutes:.1f} minutes"
    )


def record(outcome: Outcome) -> Published:
    """The recipe that was run.

    Raises:
        ValueError: for one that this version does not have.
    """
    known = SINUSOID if outcome.row is None else OMNIGLOT
    if outcome.recipe not in known:
        raise ValueError(f"this version of metamom has no recipe {outcome.recipe!r} on {outcome.experiment}.")
    return known[outcome.recipe]


def lines(outcome: Outcome) -> list[str]:
    """What a finished run prints: its evaluations next to the published figures, then those within an alphabet."""
    usual = [test for test in outcome.tested if not test.name.endswith(WITHIN)]
    within = [test for test in outcome.tested if test.name.endswith(WITHIN)]
    found = [title(outcome), "", *_printed(usual, _published(outcome, usual[0].steps))]
    if within:
        found += ["", "tasks within an alphabet", *_printed(within)]
    if any(any(each.diverged) for each in outcome.tested):
        found.append(f"(diverged: tasks with an error above {DIVERGED:g}, which the means leave out)")
    chosen = f"the checkpoint after {counted(outcome.checkpoint, 'iteration')}"
    return [*found, f"({counted(usual[0].tasks, 'test task')}, ± 95 %; {chosen})"]


def _published(outcome: Outcome, steps: Sequence[int]) -> list[str]:
    """The published figures after these adaptation steps; empty texts where there is none."""
    published = record(outcome)
    if outcome.row is None:
        points = [[f"{error:g} ({shots} shots)" for shots, at, error in published.points if at == k] for k in steps]
        return [", ".join(marks) for marks in points]
    tested_at = published.test_steps[ROWS[outcome.row].ways].value
    figure = published.figures.get(outcome.row)
    return [f"{figure} %" if figure is not None and k == tested_at else "" for k in steps]


def _printed(tests: Sequence[Measurement], published: Sequence[str] = ()) -> list[str]:
    """Measurements after the same numbers of steps, as a table of columns, with a last column if one is given."""
    rows = [["steps", *map(_heading, tests), *(["published"] if published else [])]]
    for number, steps in enumerate(tests[0].steps):
        rows.append([str(steps), *(_cell(each, number) for each in tests), *published[number : number + 1]])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _heading(test: Measurement) -> str:
    name = test.name.removesuffix(WITHIN)
    return f"{name} ({STATISTICS[name]})" if name in STATISTICS else name


def _cell(test: Measurement, number: int) -> str:
    mean, halfwidth = test.mean[number], test.halfwidth[number]
    if test.metric == "accuracy":
        return f"{100 * mean:.2f} ± {100 * halfwidth:.2f} %"
    diverged = f", {test.diverged[number]} diverged" if test.diverged[number] else ""
    return f"{mean:.3f} ± {halfwidth:.3f}{diverged}"


def omniglot_table(outcomes: Iterable[Outcome]) -> list[str]:
    """A table in Markdown of the runs on Omniglot, a line for each method, row, budget and optimizer.

    With several seeds, the mean of their accuracies and Student's 95 % interval; with one, its interval over tasks.
    """
    accuracies = [f"{name}{within}, %" for within in ("", WITHIN) for name in STATISTICS.values()]
    found = tables.head("row", "method", "budget", "outer optimizer", "seeds", *accuracies, "published", "minutes")
    grouped = _grouped(each for each in outcomes if each.row is not None)
    order = list(ROWS)
    for _, runs in sorted(grouped.items(), key=lambda item: (order.index(str(item[1][0].row)), item[0])):
        first = runs[0]
        published, row = record(first), str(first.row)
        steps = published.test_steps[ROWS[row].ways].value
        cells = [_accuracies(runs, name + within, steps) for within in ("", WITHIN) for name in STATISTICS]
        minutes = np.mean([run.minutes for run in runs])
        budget = f"{first.budget}: {first.iterations:,} × {first.meta_batch}"
        figure = published.figures.get(row, "")
        name = f"{published.title}, {steps} step{'s' if steps > 1 else ''}"
        optimizer = f"{OPTIMIZER_NAMES[first.optimizer]}, {first.lr:g}"
        found.append(tables.row(row, name, budget, optimizer, len(runs), *cells, figure, f"{minutes:.0f}"))
    return found


def _accuracies(runs: Sequence[Outcome], name: str, steps: int) -> str:
    """A cell of the table; empty if a run has no such measurement."""
    if not all(name in {test.name for test in run.tested} for run in runs):
        return ""
    return _over_seeds([run.named(name).at(steps) for run in runs], 100, 2)


def sinusoid_table(outcomes: Iterable[Outcome]) -> list[str]:
    """A table in Markdown of the runs on sinusoids: mean squared errors after 0, 1, 5 and 10 steps.

    Means leave out tasks that diverged, and say how many they were, of all seeds' tasks.
    """
    after = [f"{steps} step{'s' if steps != 1 else ''}" for steps in SHOWN_STEPS]
    found = tables.head("tested with", "method", "outer optimizer", "seeds", *after)
    grouped = _grouped(each for each in outcomes if each.row is None)
    for shots in SHOTS:
        for runs in grouped.values():
            if not shown_at(runs[0], shots):
                continue
            tests = [run.named(f"{shots} shots") for run in runs]
            cells = [
                _over_seeds([test.at(steps) for test in tests], 1, 3) + _diverged(tests, steps) for steps in SHOWN_STEPS
            ]
            optimizer = f"{OPTIMIZER_NAMES[runs[0].optimizer]}, {runs[0].lr:g}"
            found.append(tables.row(f"{shots} points", record(runs[0]).title, optimizer, len(runs), *cells))
    return found


def _diverged(tests: Sequence[Measurement], steps: int) -> str:
    number = sum(test.diverged[test.steps.index(steps)] for test in tests)
    return f", {number} of {sum(test.tasks for test in tests):,} diverged" if number else ""


def shown_at(outcome: Outcome, shots: int) -> bool:
    """Whether a run on sinusoids belongs to the figure's panel of so many shots."""
    return outcome.shots == shots or not record(outcome).same_shots


def sinusoid_figure(path: Path, outcomes: Iterable[Outcome]) -> None:
    """Draw the error against adaptation steps with 5 and 10 points: the mean of the seeds in a band from lowest to
    highest, and published values as marks.

    Args:
        path: the PNG.
        outcomes: runs on sinusoids.
    """
    grouped = _grouped(each for each in outcomes if each.row is None)
    figure, panels = row_of_panels(len(SHOTS))
    styles = {key: (COLOURS[n % 6], DASHES[n % 4]) for n, key in enumerate(_labels(grouped))}
    for panel, shots in zip(panels, SHOTS, strict=True):
        _draw(panel, {_label(runs[0]): runs for runs in grouped.values() if shown_at(runs[0], shots)}, shots, styles)
        _mark(panel, shots)
        panel.set(title=f"{shots} points", xlabel="adaptation steps", yscale="log")
    ticks = [tick for tick in TICKS if tick > panels[0].get_ylim()[0]]  # others would widen the axis
    for panel in panels:
        panel.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        panel.minorticks_off()
    panels[0].set_ylabel("mean squared error")
    handles = {label: line for panel in panels for line, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    panels[-1].legend(handles.values(), handles.keys(), frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    save(figure, path)


def _draw(
    panel: Axes, by_label: Mapping[str, Sequence[Outcome]], shots: int, styles: Mapping[str, tuple[str, str]]
) -> None:
    for label, runs in by_label.items():
        tests = [run.named(f"{shots} shots") for run in runs]
        values = np.array([test.mean for test in tests])
        colour, dash = styles[label]
        panel.plot(tests[0].steps, values.mean(0), color=colour, linestyle=dash, label=label)
        if len(tests) > 1:
            panel.fill_between(tests[0].steps, values.min(0), values.max(0), color=colour, alpha=0.2, linewidth=0)


def _mark(panel: Axes, shots: int) -> None:
    """The published values for so many shots, of every method that has some."""
    markers = iter("o^sDv")
    for published in SINUSOID.values():
        marker = next(markers)
        points = [(steps, error) for at, steps, error in published.points if at == shots]
        if points:
            style = {"color": "black", "markersize": 7, "markerfacecolor": "white", "linestyle": "none"}
            panel.plot(*zip(*points, strict=True), marker, label=f"{published.title}, published", **style)  # type: ignore[arg-type]


def _grouped(outcomes: Iterable[Outcome]) -> dict[tuple[object, ...], list[Outcome]]:
    """The runs that differ in the seed only, together."""
    found: dict[tuple[object, ...], list[Outcome]] = {}
    for each in outcomes:
        key = (each.recipe, each.row or "", each.shots, each.budget, each.optimizer, each.lr, each.iterations)
        found.setdefault((*key, each.meta_batch), []).append(each)
    return found


def _labels(grouped: Mapping[tuple[object, ...], Sequence[Outcome]]) -> list[str]:
    return list(dict.fromkeys(_label(runs[0]) for runs in grouped.values()))


def _label(outcome: Outcome) -> str:
    return f"{record(outcome).title}, {OPTIMIZER_NAMES[outcome.optimizer]} {outcome.lr:g}"


def _over_seeds(values: Sequence[tuple[float, float]], factor: int, digits: int) -> str:
    """``mean ± half-width``: over the seeds if there are several, else over the test tasks of the one."""
    means = [factor * mean for mean, _ in values]
    half = factor * values[0][1] if len(values) == 1 else student_halfwidth(means)
    return f"{np.mean(means):.{digits}f} ± {half:.{digits}f}"
