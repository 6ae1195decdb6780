"""What stands in each part of a page: a figure or a sortable table, its caption, its text alternative, its numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from metamom.common.numbers import plural
from metamom.experiments.families.family import Metric
from metamom.experiments.report import plots, summary
from metamom.experiments.report.contents import Method, Section, SeedRun
from metamom.experiments.report.plots import Column, Series, shown
from metamom.experiments.report.summary import Estimate, Pairs

MOST = 12  # methods in a figure: more lines cannot be told apart
LINES = 11  # iterations in the numbers of a curve


class Numbers(NamedTuple):
    """A plain table: the text alternative of a part."""

    head: list[str]
    rows: list[list[str]]


@dataclass
class Part:
    """A figure of a page in the sense of HTML: a plot or a sortable table, with what goes with it."""

    kind: str
    title: str
    caption: str
    alt: str
    numbers: Numbers
    model: Any
    id: str = ""
    div: str = ""


@dataclass
class View:
    """A section, drawn."""

    title: str
    text: str
    notes: list[str] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    switches: Any = None


def view(section: Section, points: int = summary.POINTS) -> View:
    """Draw a section, with so many points a curve. Parts without values are left out."""
    made = View(section.title, section.text)
    drawn = _drawn(section)
    if len(drawn) < len(section.methods):
        made.notes.append(
            f"The figures show {len(drawn)} of {len(section.methods)} methods, the best by their last validation; the "
            "table has all of them."
        )
    if gone := sum(run.diverged is not None for method in section.methods for run in method.runs):
        made.notes.append(f"{gone} run{'s' * (gone > 1)} diverged. {_of_diverged(section)}")
    if not any(run.iterations or run.test for method in section.methods for run in method.runs):
        made.notes.append("There are no measurements yet.")
    parts = (_validation(section, drawn, points), _loss(section, drawn, points), _adaptation(section, drawn))
    figures = [part for part in parts if part]
    found = summary.differences(section)
    made.parts = [*figures, _table(section)]
    if found:
        made.parts.append(_differences(section, drawn, found))
    if figures and len(drawn) > 1:
        made.switches = plots.switches(_names(drawn), [part.model for part in made.parts if part.kind == "plot"])
    return made


def _of_diverged(section: Section) -> str:
    if all(len(method.runs) == 1 for method in section.methods):
        return "Its curve ends there, and no table has a result of it."
    return (
        "Means and intervals cover only the others, which flatters a method of which seeds diverged: the table counts "
        "them."
    )


def _drawn(section: Section) -> list[Method]:
    """The methods in figures: all, or the best `MOST`."""
    if len(section.methods) <= MOST:
        return list(section.methods)

    def badness(method: Method) -> tuple[bool, float]:
        end = summary.over_seeds([run.final for run in method.finished])
        value = math.inf if end is None else -end.mean if section.metric.higher_is_better else end.mean
        return method.label != section.baseline, value

    kept = sorted(section.methods, key=badness)[:MOST]
    return [method for method in section.methods if method in kept]


def _names(methods: Sequence[Method]) -> list[str]:
    return [method.label for method in methods]


def _series(methods: Sequence[Method], points: Callable[[Method], list[tuple[int, Estimate]]]) -> Series:
    return {method.label: found for method in methods if (found := points(method))}


def _validation(section: Section, drawn: Sequence[Method], points: int) -> Part | None:
    series = _series(drawn, lambda method: summary.validation(method, points))
    if not series:
        return None
    name = f"validation {section.metric.name}"
    model = plots.curves(
        series,
        _names(drawn),
        ylabel=name,
        metric=section.metric,
        target=section.target,
        reached={method.label: summary.to_target(section, method) for method in drawn},
    )
    target = "" if section.target is None else _of_target(section, section.target, series)
    cut = _cut(section.metric, series)
    caption = f"{name.capitalize()} during training: {_of_seeds(drawn)}{cut}{target} {HOW}"
    return _curve_part("Learning curves", caption, section, series, model)


def _of_target(section: Section, target: float, series: Series) -> str:
    ends = [end for points in series.values() for _, each in points for end in each.within(section.metric)]
    inside = min(ends) <= target <= max(ends)
    value = section.metric.exactly(target)
    if not inside:
        return f" The target, {value}, is outside the figure."
    return f" The dashed line is the target, {value}, with a dot for each seed that reached it."


def _loss(section: Section, drawn: Sequence[Method], points: int) -> Part | None:
    series = _series(drawn, lambda method: summary.training_loss(method, points))
    if not series:
        return None
    metric = section.loss
    model = plots.curves(series, _names(drawn), ylabel="training loss", metric=metric)
    told = f"{_of_seeds(drawn)}{_cut(metric, series)} {HOW}"
    caption = f"Query loss on the training tasks, averaged over blocks of iterations: {told}"
    return _curve_part("Training loss", caption, Section("", metric, section.methods), series, model)


HOW = "Drag to zoom; click a name in the legend to hide it."


def _of_seeds(methods: Sequence[Method]) -> str:
    most = max(len(method.finished) for method in methods)
    if most < 2:
        return "one run of each method."
    return f"mean over up to {most} seeds, in a band of the mean's 95 % interval (Student's t)."


def _cut(metric: Metric, series: Series) -> str:
    """A sentence on intervals that reach beyond the metric's bounds, if there are any."""
    estimates = [estimate for points in series.values() for _, estimate in points]
    bounds = [
        f"{metric.factor * bound:g}{metric.unit}"
        for bound, beyond in (
            (metric.least, any(each.low < metric.least for each in estimates)),
            (metric.most, any(each.high > metric.most for each in estimates)),
        )
        if beyond
    ]
    return (
        f" Intervals are cut off at {' and '.join(bounds)}, the {plural(len(bounds), 'limit')} of the {metric.name}."
        if bounds
        else ""
    )


def _curve_part(title: str, caption: str, section: Section, series: Series, model: Any) -> Part:
    ends = ", ".join(
        f"{label} ends at {shown(section.metric, points[-1][1])} after {points[-1][0]:,} iterations"
        for label, points in series.items()
    )
    every = sorted({at for points in series.values() for at, _ in points})
    kept = sorted({every[round(i)] for i in np.linspace(0, len(every) - 1, min(LINES, len(every)))})
    values = {label: dict(points) for label, points in series.items()}
    rows = [[f"{at:,}", *(shown(section.metric, each.get(at)) for each in values.values())] for at in kept]
    return Part(
        "plot", title, caption, f"{title} against iterations: {ends}.", Numbers(["iterations", *series], rows), model
    )


def _adaptation(section: Section, drawn: Sequence[Method]) -> Part | None:
    steps = section.steps
    series = _series(
        drawn, lambda method: [(at, found) for at in steps if (found := summary.tested(method, at)) is not None]
    )
    if not series:
        return None
    metric = section.metric
    model = plots.adaptation(series, _names(drawn), ylabel=f"test {metric.name}", metric=metric)
    cut = _cut(metric, series)
    single = all(len(method.runs) == 1 for method in drawn)
    of = "over the test tasks of the single run" if single else "of the mean over seeds (Student's t)"
    values = {label: dict(points) for label, points in series.items()}
    rows = [[str(at), *(shown(metric, each.get(at)) for each in values.values())] for at in steps]
    ends = ", ".join(f"{label} {shown(metric, points[-1][1])}" for label, points in series.items())
    return Part(
        "plot",
        f"Test {metric.name} against adaptation steps",
        f"{metric.name.capitalize()} on new tasks after so many inner steps; whiskers are the 95 % interval {of}.{cut}",
        f"Test {metric.name} against adaptation steps. At the largest number: {ends}.",
        Numbers(["adaptation steps", *series], rows),
        model,
    )


def _differences(section: Section, drawn: Sequence[Method], found: Sequence[Pairs]) -> Part:
    metric = section.metric
    last = max((each.steps for each in found if each.steps is not None), default=None)
    what = "last validation" if last is None else f"test, {last} adaptation step{'s' * (last != 1)}"
    model = plots.pairs(
        [each for each in found if each.steps == last and each.label in _names(drawn)],
        _names(drawn),
        xlabel=f"difference in {metric.name}, {what}",
        metric=metric,
    )
    seeds = list(dict.fromkeys(str(seed) for each in found for seed, _ in each.by_seed))
    rows = []
    for each in found:
        by_seed = {str(seed): gap for seed, gap in each.by_seed}
        steps = "–" if each.steps is None else str(each.steps)
        gaps = [metric.show(by_seed[seed]) if seed in by_seed else "–" for seed in seeds]
        rows.append([each.label, steps, shown(metric, each.estimate), *gaps])
    caption = _of_differences(section, what)
    if left := max(each.left_out for each in found):
        caption += f" Up to {left} seed{'s' * (left > 1)} of a method had no finished pair and are left out."
    ends = ", ".join(f"{each.label} {shown(metric, each.estimate)}" for each in found if each.steps == last)
    head = ["method", "adaptation steps", "mean ± 95 %", *(f"seed {seed}" for seed in seeds)]
    return Part(
        "plot",
        f"Paired differences from {section.baseline}",
        caption,
        f"Paired differences from {section.baseline} in {metric.name}, {what}: {ends}.",
        Numbers(head, rows),
        model,
    )


def _of_differences(section: Section, what: str) -> str:
    if section.measured:
        return f"Each method minus {section.baseline}, task by task: the mean with its 95 % interval."
    better = "above" if section.metric.higher_is_better else "below"
    return (
        f"Each method minus {section.baseline}, seed by seed, {what}: small dots are seeds, the diamond is their mean "
        f"with its 95 % interval (Student's t). A difference {better} zero is in favour of the method."
    )


def _table(section: Section) -> Part:
    columns = table_columns(section)
    rows = [[column.cells[row] for column in columns] for row in range(len(section.methods))]
    notes = [
        "A row for each method; a click on a heading sorts by that column. Iterations and bytes are means over runs."
    ]
    if len({len(method.runs) for method in section.methods} | {1}) > 1:
        notes.append("± is the 95 % interval of the mean over seeds (Student's t).")
    if section.target is not None:
        notes.append(
            f"{TO_TARGET.capitalize()}: until validation {section.metric.name} is at "
            f"{'least' if section.metric.higher_is_better else 'most'} {section.metric.exactly(section.target)}, the "
            "median over the seeds that reach it."
        )
    numbers = Numbers([column.title for column in columns], rows)
    return Part("table", "All methods", " ".join(notes), "", numbers, plots.table(columns))


TO_TARGET, SENT, EXCHANGED = "iterations to target", "bytes sent by workers", "bytes between processes"
NONE = "–"


def table_columns(section: Section) -> list[Column]:
    """The columns of the table of methods: those with anything in them."""
    found = _all_columns(section)
    return [column for column in found if set(column.cells) - {NONE, "0" if column.title != "method" else NONE}]


def _all_columns(section: Section) -> list[Column]:
    methods, metric = section.methods, section.metric
    labels = [method.label for method in methods]
    finals = [summary.over_seeds([run.final for run in method.finished]) for method in methods]
    return [
        Column("method", labels, labels),
        _estimates(f"validation {metric.short}", finals, metric),
        *(
            _estimates(f"test, {at} step{'s' * (at != 1)}", [summary.tested(method, at) for method in methods], metric)
            for at in section.steps
        ),
        _to_target(section),
        _counts("diverged", [len(method.runs) - len(method.finished) for method in methods]),
        _counts("runs", [len(method.runs) for method in methods]),
        _counts("iterations", [_mean(method, lambda run: run.iterations) for method in methods]),
        _counts(SENT, [_mean(method, lambda run: run.sent) for method in methods]),
        _counts(EXCHANGED, [_mean(method, lambda run: run.exchanged) for method in methods]),
    ]


def _to_target(section: Section) -> Column:
    found = [summary.to_target(section, method) for method in section.methods]
    medians = [float(np.median(each)) if each else math.inf for each in found]
    cells = []
    for method, reached, median in zip(section.methods, found, medians, strict=True):
        share = f" ({len(reached)} of {len(method.runs)})" if 0 < len(reached) < len(method.runs) else ""
        cells.append(NONE if section.target is None else f"{median:,g}{share}" if reached else "never")
    return Column(TO_TARGET, medians, cells)


def _estimates(title: str, found: Sequence[Estimate | None], metric: Metric) -> Column:
    keys = [math.inf if each is None else metric.factor * each.mean for each in found]
    return Column(title, keys, [shown(metric, each) for each in found])


def _counts(title: str, values: Sequence[float]) -> Column:
    keys = [value if math.isfinite(value) else math.inf for value in values]
    return Column(title, keys, [f"{value:,.0f}" if math.isfinite(value) else NONE for value in values])


def _mean(method: Method, of: Callable[[SeedRun], int | None]) -> float:
    found = [value for run in method.runs if (value := of(run))]
    return float(np.mean(found)) if found else math.nan
