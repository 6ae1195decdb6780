"""Measured bias over the inner batch size, as a table, a figure, JSON and a page.

    metamom bias sinusoid --inner-batch 1,2,5,10,20 --out DIR

writes ``DIR/bias.md`` and ``DIR/figures/bias.png``; a run directory can be given instead of the task.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from metamom.batch import Sampler
from metamom.common import tables
from metamom.common.checks import AT_ONCE, check_whole
from metamom.common.files import write_atomically
from metamom.common.intervals import Interval
from metamom.diagnostics.bias_meter import AtSize, Measured, Part, measure
from metamom.diagnostics.power_law import Slope
from metamom.diagnostics.while_training import TrackBias
from metamom.experiments.recipes import DTYPES, Recipe
from metamom.experiments.shared.figures import COLOURS, DASHES, row_of_panels, save
from metamom.maml.learner import MAML
from metamom.training.directory import environment

WORDS = {
    "bias": "bias",
    "curvature": "curvature: the inner batch in a non-linear gradient",
    "coupling": "coupling: the same inner batch in the Hessian",
    "hessian": "Hessian: dropped, or from finite differences",
    "extrapolation": "extrapolation of Richardson",
    "perturbation": "perturbation: differences in nu",
    "estimator": "the estimator itself",
    "operator": "operator: C(g) - g",
}
FEWEST = 12  # number of workers, of several tasks each, behind an interval


def measure_recipe(
    recipe: Recipe,
    learner: MAML,
    *,
    inner_batches: tuple[int, ...] | None = None,
    tasks: int | None = None,
    root: str | None = None,
    sampler: Callable[[Recipe, str | None], Sampler] | None = None,
) -> Measured:
    """The bias meter on a recipe's training tasks, with a pool for each.

    Args:
        recipe: the tasks, the bias operator and the number of tasks per worker.
        learner: the weights and the estimator.
        inner_batches: in shots; ``None`` for the family's default.
        tasks: the total; ``None`` for the family's default. With an operator, at least 12 workers of several tasks.
        root: of the data.
        sampler: makes the training tasks of a recipe, given the root of the data; the recipe's own by default.

    Raises:
        ValueError: see `measure`.
    """
    plan = recipe.family.bias
    sizes = plan.inner_batches if inner_batches is None else inner_batches
    count = plan.tasks if tasks is None else tasks
    if check_whole("tasks", count, -math.inf, AT_ONCE) < 3:
        raise ValueError(f"an interval needs at least 3 tasks; got tasks={count}.")
    operator, each = recipe.operator(), _tasks_per_worker(recipe)
    return measure(
        learner.to(DTYPES[plan.dtype]),
        pools(recipe, plan.pool, plan.queries, sizes, root=root, sampler=sampler),
        inner_batches=sizes,
        bias=operator,
        draws=count if each == 1 else max(FEWEST, count // each),
        tasks_per_worker=each,
        queries=recipe.queries,
        most_pairs=plan.pairs,
        label=f"bias {recipe.task}",
    )


def tracking(recipe: Recipe, every: int, *, root: str | None = None) -> TrackBias:
    """What ``train --track-bias every=N`` measures: a few tasks, with --shots points.

    Args:
        recipe: the run.
        every: N >= 1.
        root: the folder of the data.
    """
    assert recipe.shots is not None
    plan = recipe.family.bias
    pool = min(plan.pool, 8 * recipe.shots * (recipe.inner_steps if recipe.inner_batches == "fresh" else 1))
    return TrackBias(
        every,
        pools(recipe, max(4, pool), plan.queries, (recipe.shots,), root=root),
        recipe.shots,
        tasks_per_worker=_tasks_per_worker(recipe),
        queries=recipe.queries,
    )


def pools(
    recipe: Recipe,
    shots: int,
    queries: int,
    inner_batches: tuple[int, ...],
    *,
    root: str | None = None,
    sampler: Callable[[Recipe, str | None], Sampler] | None = None,
) -> Sampler:
    """A recipe's training tasks with larger sets, and independent draws where the tasks are fixed."""
    assert recipe.queries is not None
    turns = recipe.inner_steps if recipe.inner_batches == "fresh" else 1
    larger = replace(
        recipe,
        shots=max(shots, 2 * turns * max(inner_batches, default=1)),
        queries=max(queries, recipe.queries),
        estimator="exact",
        inner_batches="same",
        order="replacement",
    )
    return larger.sampler(root=root) if sampler is None else sampler(larger, root)


def _tasks_per_worker(recipe: Recipe) -> int:
    """The number of tasks in a draw: a worker's where an operator acts on their mean, else one."""
    assert recipe.meta_batch is not None
    return 1 if recipe.operator() is None else max(1, recipe.meta_batch // recipe.workers)


def table(found: Measured) -> str:
    """A line for each size and source, at most 100 columns."""
    lines = [f"{'m':>4}  {'':<13}  {'norm':>9}  {_level(found) + ' interval':<22}  {'of gradient':>11}  zero"]
    for at in found.sizes:
        for number, (name, part) in enumerate(_parts(at)):
            low, high = (_number(end) for end in (part.norm.low, part.norm.high))
            lines.append(
                f"{at.inner_batch if number == 0 else '':>4}  {name:<13}  {_number(part.norm.value):>9}  "
                f"{f'{low} to {high}':<22}  {_share(part, found):>11}  {_zero(part)}"
            )
        low, high = (_number(end) for end in (at.variance.low, at.variance.high))
        lines.append(f"{'':>4}  {'variance':<13}  {_number(at.variance.value):>9}  {low} to {high}")
    return "\n".join(lines)


def summary(found: Measured) -> list[str]:
    """Sentences that explain the table's numbers."""
    each = "one task" if found.tasks_per_worker == 1 else f"{found.tasks_per_worker} tasks"
    lines = [
        f"estimator {found.estimator}, operator {found.bias}; {found.draws} draws of {each}; m in shots",
        f"norm of the gradient: {_with_interval(found.gradient)}",
        "variance: of one worker's message, over its tasks, inner batches and query points",
    ]
    if found.correction is not None:
        lines.append(f"reference: inner batches of {found.pool // 2} shots, extrapolated")
        lines.append(
            f"its correction by the extrapolation: {_with_interval(found.correction)}; at most 1.4 times as "
            "much remains"
        )
    else:
        lines.append("reference: the exact population")
    return lines


def slopes(found: Measured) -> list[str]:
    """How the bias and its sources decrease with m, one sentence each."""
    said = {"bias": "bias" if found.bias == "none" else "bias without the operator's"}
    return [f"{said.get(name, name)}: {_slope_words(slope)}" for name, slope in found.slopes.items()]


def as_json(found: Measured) -> dict[str, Any]:
    """The numbers as JSON values: intervals are ``{"value", "low", "high"}``, of norms except for the variance."""
    return {
        "estimator": found.estimator,
        "operator": found.bias,
        "reference": found.reference,
        "draws": found.draws,
        "tasks_per_worker": found.tasks_per_worker,
        "pool": found.pool,
        "confidence": found.confidence,
        "gradient": found.gradient._asdict(),
        "correction": None if found.correction is None else found.correction._asdict(),
        "sizes": [
            {
                "inner_batch": at.inner_batch,
                "bias": _part_json(at.bias),
                "sources": {name: _part_json(part) for name, part in at.sources.items()},
                "variance": at.variance._asdict(),
            }
            for at in found.sizes
        ],
        "slopes": {
            name: None
            if slope is None
            else {
                **slope.exponent._asdict(),
                "sizes": list(slope.sizes),
                "consistent_with": list(slope.consistent),
            }
            for name, slope in found.slopes.items()
        },
    }


def write(found: Measured, folder: Path, title: str) -> Path:
    """Write ``bias.md`` and ``figures/bias.png`` in the folder.

    Args:
        found: what was measured.
        folder: created if it does not exist.
        title: the model and the tasks.

    Returns:
        The path of ``bias.md``.
    """
    draw(found, folder / "figures" / "bias.png", title)
    level = _level(found)
    about = environment()
    program, *arguments = about.pop("command")
    command = shlex.join(["metamom" if program.endswith(("__main__.py", "metamom")) else program, *arguments])
    lines = [f"# Bias of the meta-gradient: {title}", "", f"`{command}`", ""]
    lines += [f"- {line}" for line in [*summary(found), *slopes(found)]]
    lines += ["", "![bias over the inner batch size](figures/bias.png)", ""]
    lines += tables.head("m", "", "norm", f"{level} interval", "of gradient", "zero", right=(0, 2, 4))
    for at in found.sizes:
        for name, part in _parts(at):
            low, high = (_number(end) for end in (part.norm.low, part.norm.high))
            cells = (str(at.inner_batch), name, _number(part.norm.value), f"{low} to {high}", _share(part, found))
            lines.append(tables.row(*cells, _zero(part)))
        low, high = (_number(end) for end in (at.variance.low, at.variance.high))
        lines.append(tables.row(at.inner_batch, "variance", _number(at.variance.value), f"{low} to {high}", "", ""))
    names = [name for name, _ in _parts(found.sizes[0]) if name in WORDS]
    lines += ["", *(f"- {WORDS[name]}" for name in names)]
    lines += [
        "",
        "Squared norms are means of products of different draws, so that noise adds nothing to them; intervals are "
        "the jackknife's. Where zero is not excluded, the norm is shown as 0 if its estimated square is negative.",
        "",
        ", ".join(f"{name} {value}" for name, value in about.items()),
        "",
    ]
    path = folder / "bias.md"
    write_atomically(path, "\n".join(lines).encode())
    return path


def draw(found: Measured, path: Path, title: str) -> None:
    """Plot the norms with their intervals on logarithmic axes, and the fitted powers as lines.

    Where zero is not excluded, only the interval's upper end is drawn, with a downward arrow.
    """
    figure, (panel,) = row_of_panels(1)
    sizes = [at.inner_batch for at in found.sizes]
    names = [name for name, _ in _parts(found.sizes[0])]
    lowest = min((part.norm.low for at in found.sizes for _, part in _parts(at) if part.excludes_zero), default=None)
    for number, name in enumerate(names):
        colour, shift = COLOURS[number % 6], 1.04 ** (number - (len(names) - 1) / 2)
        parts = [dict(_parts(at))[name] for at in found.sizes]
        seen = [(m * shift, part.norm) for m, part in zip(sizes, parts, strict=True) if part.excludes_zero]
        unseen = [(m * shift, part.norm.high) for m, part in zip(sizes, parts, strict=True) if not part.excludes_zero]
        slope = found.slopes.get(name)
        if name == "bias" and "operator" in names:
            slope = None  # that is the slope of the estimator's share
        label = name if slope is None else f"{name}, ~ m^{slope.exponent.value:.2f}"
        spread = [[n.value - n.low for _, n in seen], [n.high - n.value for _, n in seen]]
        panel.errorbar(
            [x for x, _ in seen], [n.value for _, n in seen], spread, fmt="o", markersize=4, capsize=2, color=colour,
            label=label,
        )  # fmt: skip
        for x, high in unseen:
            if high > 0:
                panel.annotate(
                    "",
                    (x, high * 0.6),
                    (x, high),
                    arrowprops={"arrowstyle": "->", "color": colour},
                    annotation_clip=True,
                )
                panel.plot([x], [high], "_", color=colour, markersize=8)
        if slope is not None:
            line = [slope.scale * m**slope.exponent.value for m in sizes]
            panel.plot(sizes, line, color=colour, linestyle=DASHES[number % 4], linewidth=1)
    panel.set(xscale="log", yscale="log", xlabel="inner batch m (shots)", ylabel="norm of the bias", title=title)
    panel.set_xticks(sizes, [str(m) for m in sizes])
    panel.set_xticks([], minor=True)
    if lowest is not None:
        panel.set_ylim(bottom=lowest / 2)
    panel.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    save(figure, path)


def _parts(at: AtSize) -> list[tuple[str, Part]]:
    return [("bias", at.bias), *at.sources.items()]


def _part_json(part: Part) -> dict[str, Any]:
    return {**part.norm._asdict(), "squared": part.squared.value, "excludes_zero": part.excludes_zero}


def _level(found: Measured) -> str:
    return f"{100 * found.confidence:g} %"


def _zero(part: Part) -> str:
    return "excluded" if part.excludes_zero else "not excluded"


def _share(part: Part, found: Measured) -> str:
    if found.gradient.value == 0:
        return "-"
    percent = 100 * part.norm.value / found.gradient.value
    return f"{percent:.0f} %" if percent >= 100 else f"{percent:.2g} %"


def _number(value: float) -> str:
    return f"{value:.3g}"


def _with_interval(interval: Interval) -> str:
    return f"{_number(interval.value)} [{_number(interval.low)}, {_number(interval.high)}]"


def _slope_words(slope: Slope | None) -> str:
    return "zero is excluded at fewer than two sizes, so there is no slope to see" if slope is None else slope.words
