"""The report of a comparison: tables and figures."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from metamom.common import tables
from metamom.common.choices import STATISTICS_OF
from metamom.common.files import write_atomically
from metamom.common.intervals import student_halfwidth
from metamom.experiments.families.family import Metric
from metamom.experiments.saved import load_run
from metamom.experiments.shared import figures
from metamom.experiments.shared.numerals import shortest
from metamom.maml.learner import MAML
from metamom.training.directory import environment

if TYPE_CHECKING:
    from metamom.experiments.compare import Comparison, Outcome
    from metamom.experiments.recipes import Recipe


class Arm(NamedTuple):
    """A method at one step size, over its seeds."""

    label: str
    lr: float
    outcomes: list[Outcome]

    @property
    def finished(self) -> list[Outcome]:
        """The seeds that did not diverge."""
        return [o for o in self.outcomes if o.diverged is None]

    @property
    def whole(self) -> bool:
        """Whether no seed diverged."""
        return len(self.finished) == len(self.outcomes)

    def validation(self) -> float:
        """Mean of the last validation over the seeds that did not diverge; NaN if all did."""
        return float(np.mean([o.curve[-1][1] for o in self.finished])) if self.finished else math.nan

    def of_seeds(self) -> str:
        """``" (2 of 3 seeds)"`` if some seeds diverged, but not all."""
        if self.whole or not self.finished:
            return ""
        return f" ({len(self.finished)} of {len(self.outcomes)} seeds)"


def write_report(comparison: Comparison, outcomes: Sequence[Outcome], folder: Path, reused: int = 0) -> Path:
    """Write ``report.md`` and ``figures/*.png``; ``reused`` runs were finished before this call.

    Returns:
        The path of ``report.md``.
    """
    metric = comparison.base.family.metric
    arms = arms_of(outcomes)
    best = best_of_each(arms, metric)
    pictures = _draw(comparison, arms, best, metric, folder)
    base = comparison.base
    lines = [
        f"# Composite momentum and plain meta-SGD on {base.family.titled(base.ways, base.shots)}",
        "",
        f"`{_command()}`",
        "",
        f"{comparison.iterations:,} iterations of {base.meta_batch} tasks ({_plural(base.shots or 0, 'shot')}, "
        f"{_plural(base.queries or 0, 'query', 'queries')}), "
        f"{_plural(base.inner_steps, 'inner step')} of {shortest(base.inner_lr or 0)}"
        f"{' at first' * bool(base.learn_inner_lr)} in training, "
        f"{_plural(comparison.seeds, 'seed')}; {comparison.test_tasks} test tasks for each seed, the same for every "
        f"method. β = 1 is plain meta-SGD.{_normalised(base)}",
        "",
        f"## {metric.name.capitalize()} on test tasks",
        "",
        *_table(arms, comparison, metric),
        "",
        f"± is the 95 % interval {_interval_of(comparison.seeds)}. {_of_diverged(arms)}"
        f"Iterations to target: until validation {metric.name} "
        f"{'is at least' if metric.higher_is_better else 'is at most'} {metric.exactly(comparison.target)}, "
        f"looked at every {comparison.evaluate_every} iterations and at the end: the median over the seeds that reach "
        "it, also where they diverge later.",
    ]
    if len(comparison.lrs) > 1:
        lines += [
            "",
            "## Each method at its own best step size",
            "",
            f"Best by final validation over the grid γ ∈ {{{', '.join(map(shortest, comparison.lrs))}}}, the same "
            f"for every method; step sizes at which a seed diverged are left out{_but(best)}.",
            "",
            *_table(best, comparison, metric),
        ]
    lines += ["", *_differences(best, comparison, metric), "## Figures", ""]
    lines += [f"![{caption}](figures/{name}.png)\n\n{caption}\n" for name, caption in pictures]
    if reused:
        lines += [
            f"{reused} of {len(outcomes)} runs were already finished, and not repeated.",
            "",
        ]
    env = environment()
    lines += [
        f"metamom {env['metamom']}, torch {env['torch']}, Python {env['python']}, {env['platform']}, "
        f"{_plural(env['threads'], 'thread')}.",
        "",
    ]
    path = folder / "report.md"
    write_atomically(path, "\n".join(lines).encode())
    return path


def arms_of(outcomes: Iterable[Outcome]) -> list[Arm]:
    """The methods at each step size, with their runs."""
    groups: dict[tuple[str, float], Arm] = {}
    for outcome in outcomes:
        recipe = outcome.recipe
        assert recipe.lr is not None
        label = (
            "plain meta-SGD (β = 1)"
            if recipe.beta == 1
            else f"momentum, β = {shortest(recipe.beta)}, {_FIRST[recipe.first_step]}"
        )
        groups.setdefault((label, recipe.lr), Arm(label, recipe.lr, [])).outcomes.append(outcome)
    return list(groups.values())


_FIRST = {"zero": "v₋₁ = 0", "gradient": "v₀ = g₀"}


def best_learners(comparison: Comparison, outcomes: Sequence[Outcome]) -> dict[str, MAML]:
    """The learner of each method's first run at its best step size that did not diverge, if the report draws it.

    Returns:
        The learners by the method's label.

    Raises:
        ValueError: if one of them cannot be read.
    """
    if comparison.base.family.curve is None:
        return {}
    best = best_of_each(arms_of(outcomes), comparison.base.family.metric)
    return {arm.label: load_run(arm.finished[0].path, "newest").learner for arm in best if arm.finished}


def best_of_each(arms: list[Arm], metric: Metric) -> list[Arm]:
    """Each method at its best step size."""
    return [
        _best([arm for arm in arms if arm.label == label], metric) for label in dict.fromkeys(a.label for a in arms)
    ]


def _best(arms: list[Arm], metric: Metric) -> Arm:
    """The step size with the best final validation, among those at which the fewest seeds diverged."""

    def badness(arm: Arm) -> tuple[int, bool, float]:
        value = arm.validation()
        return -len(arm.finished), math.isnan(value), -value if metric.higher_is_better else value

    return min(arms, key=badness)


def _table(arms: Sequence[Arm], comparison: Comparison, metric: Metric) -> list[str]:
    names = ["before" if s == 0 else f"{s} step{'s' if s > 1 else ''}" for s in comparison.steps]
    head = ["method", "γ", *names, "iterations to target", "diverged"]
    rows = [
        [arm.label, shortest(arm.lr), *_tests(arm, comparison, metric), *_speed(arm, comparison, metric)]
        for arm in arms
    ]
    return [*tables.head(*head), *(tables.row(*row) for row in rows)]


def _tests(arm: Arm, comparison: Comparison, metric: Metric) -> list[str]:
    cells = []
    for number in range(len(comparison.steps)):
        means = [o.test[number] for o in arm.finished if o.test is not None]
        widths = [o.halfwidth[number] for o in arm.finished if o.halfwidth is not None]
        if not means:
            cells.append("—")
            continue
        mean = float(np.mean(means))
        if len(arm.outcomes) == 1:
            cells.append(metric.with_interval(mean, widths[0]))
        elif len(means) == 1:
            # a single seed is left of several: an interval over its test tasks would mean something else
            cells.append(f"{metric.show(mean)}{metric.unit}{arm.of_seeds()}")
        else:
            cells.append(f"{metric.with_interval(mean, student_halfwidth(means))}{arm.of_seeds()}")
    return cells


def _speed(arm: Arm, comparison: Comparison, metric: Metric) -> list[str]:
    firsts = []
    for outcome in arm.outcomes:
        reached = [iteration for iteration, value in outcome.curve if metric.reached(value, comparison.target)]
        firsts += reached[:1]
    seeds = len(arm.outcomes)
    median = shortest(float(np.median(firsts))) if firsts else "never"
    share = "" if len(firsts) in (0, seeds) else f" ({len(firsts)} of {seeds} seeds)"
    return [median + share, f"{seeds - len(arm.finished)} of {seeds}"]


def _differences(best: Sequence[Arm], comparison: Comparison, metric: Metric) -> list[str]:
    """Each method against plain meta-SGD, seed by seed, so that what the seeds' tasks have in common cancels."""
    plain = next((arm for arm in best if arm.outcomes[0].recipe.beta == 1), None)
    others = [arm for arm in best if arm is not plain]
    if plain is None or comparison.seeds < 2 or not others:
        return []
    if not plain.whole:
        return [f"No differences from {plain.label}: seeds of it diverged at every step size.", ""]
    head = f"Difference from {plain.label}, γ = {shortest(plain.lr)}, on the same seeds and test tasks (95 % interval):"
    lines = [head, ""]
    for arm in others:
        if not arm.whole:
            lines.append(f"- {arm.label}, γ = {shortest(arm.lr)}: none, because seeds diverged.")
            continue
        cells = []
        for number, steps in enumerate(comparison.steps):
            theirs = (outcome.test[number] for outcome in plain.outcomes if outcome.test is not None)
            ours = (outcome.test[number] for outcome in arm.outcomes if outcome.test is not None)
            gaps = np.array(list(ours)) - np.array(list(theirs))
            interval = metric.with_interval(float(gaps.mean()), student_halfwidth(gaps.tolist()))
            cells.append(f"{interval} after {_plural(steps, 'step')}")
        lines.append(f"- {arm.label}, γ = {shortest(arm.lr)}: {', '.join(cells)}.")
    return [*lines, ""]


def _draw(
    comparison: Comparison, arms: Sequence[Arm], best: Sequence[Arm], metric: Metric, folder: Path
) -> list[tuple[str, str]]:
    """Draw the figures; returns their names and captions."""
    found = best_learners(
        comparison, [outcome for arm in arms for outcome in arm.outcomes]
    )  # before any figure is drawn
    single = len(comparison.lrs) == 1
    labels = {arm.label: arm.label if single else f"{arm.label}, γ = {shortest(arm.lr)}" for arm in best}
    band = "" if comparison.seeds == 1 else f", mean and range of {comparison.seeds} seeds"
    if band and not all(arm.whole for arm in best):
        band = ", mean and range of the seeds that did not diverge"
    figures.learning_curves(
        folder / "figures" / "curves.png",
        {labels[arm.label] + arm.of_seeds(): [o.curve for o in arm.finished] for arm in best},
        ylabel=f"validation {metric.name}",
        title=f"Validation after {_plural(comparison.base.inner_steps, 'inner step')}",
        target=comparison.target,
        log=not metric.higher_is_better,
    )
    at = "" if single else ", each method at its best step size"
    drawn = [("curves", f"Learning curves{at}{band}.")]
    kept = "" if all(arm.whole for arm in arms) else " that did not diverge"
    if not single:
        figures.step_sizes(
            folder / "figures" / "step_sizes.png",
            {label: {a.lr: [o.curve[-1][1] for o in a.finished] for a in arms if a.label == label} for label in labels},
            ylabel=f"final validation {metric.name}",
            title="The grid",
        )
        points = f"a point for each seed{kept}, a line through their means"
        drawn.append(("step_sizes", f"Final validation against the step size; {points}."))
    curve = comparison.base.family.curve
    if curve is not None and found:
        learners = {labels[label]: learner for label, learner in found.items()}
        tasks = comparison.base.sampler("test")
        path = folder / "figures" / "adaptation.png"
        figures.adaptation(path, learners, tasks.sample(0, 1), curve(tasks), comparison.steps)
        seeds = dict.fromkeys(arm.finished[0].recipe.seed for arm in best if arm.finished)
        of = f"the learner{'s' * (len(learners) > 1)} of seed {' and '.join(map(str, seeds))}"
        if len(seeds) > 1:
            of = "each method's learner of its first seed that did not diverge"
        seed = comparison.base.seed
        drawn.append(("adaptation", f"One test task (seed {seed}) before and after adaptation, by {of}."))
    return drawn


def _interval_of(seeds: int) -> str:
    if seeds == 1:
        return "over the test tasks of the single seed; it does not include the variation between seeds"
    return f"of the mean over {seeds} seeds (Student's t)"


def _of_diverged(arms: Sequence[Arm]) -> str:
    """A note on the numbers of arms with diverged seeds, if there are any."""
    if not any(arm.of_seeds() for arm in arms):
        return ""
    return (
        "Where seeds diverged, mean and interval cover only the others, which flatters the method: their number is "
        "in brackets, and a single one has no interval. "
    )


def _normalised(base: Recipe) -> str:
    """Which statistics normalise queries, in a network that normalises."""
    return "" if base.ways is None else f" Normalisation uses {STATISTICS_OF[base.norm or 'batch']}."


def _but(best: Sequence[Arm]) -> str:
    if all(arm.whole for arm in best):
        return ""
    return ", unless a seed diverged at all of them: then the best of those with the fewest"


def _plural(n: int, one: str, many: str | None = None) -> str:
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def _command() -> str:
    program, *arguments = environment()["command"]
    return shlex.join(["metamom" if program.endswith(("__main__.py", "metamom")) else program, *arguments])
