"""Read the directory of ``metamom compare``: its runs, as sections of a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from metamom.common.schema import read_record
from metamom.experiments.compare import Ending, Outcome
from metamom.experiments.recipes import Recipe
from metamom.experiments.report.contents import Method, Section, SeedRun
from metamom.experiments.report.logged import Logged, read_run
from metamom.experiments.report.markdown import Arm, arms_of, best_of_each
from metamom.experiments.shared.numerals import shortest
from metamom.training.directory import read_config


def comparison_sections(place: Path, settings: Mapping[str, Any]) -> tuple[list[Section], list[Logged], bool]:
    """The sections of a comparison, its runs, and whether it has ended."""
    base = Recipe.from_settings(settings["base"], f"the comparison in {place}")
    steps = tuple(settings.get("steps") or ())
    outcomes, logged = [], {}
    paths = sorted((place / "runs").glob("*/config.json"))
    members = []
    for path in paths:
        found = read_run(path.parent, read_config(path.parent))
        outcome = _outcome(found, steps)
        found = found._replace(run=replace(found.run, diverged=outcome.diverged))
        members.append(found)
        if found.run.curve or outcome.diverged is not None:
            outcomes.append(outcome)
            logged[found.path] = found
    arms = arms_of(sorted(outcomes, key=lambda each: (-each.recipe.beta, each.recipe.lr, each.recipe.seed)))
    lrs, metric = settings.get("lrs") or [], base.family.metric
    title = base.family.titled(base.ways, base.shots)
    told = (
        f"{settings.get('iterations', 0):,} iterations of {base.meta_batch} tasks, {settings.get('seeds')} seeds, "
        f"inner step size {shortest(base.inner_lr or 0)}. β = 1 is plain meta-SGD."
    )
    target = settings.get("target")

    def section(title: str, arms: Sequence[Arm], text: str, baseline: str | None) -> Section:
        methods = tuple(Method(_label(arm), tuple(_joined(each, logged) for each in arm.outcomes)) for arm in arms)
        return Section(title, metric, methods, target, text, baseline)

    best = best_of_each(arms, metric)
    plain = next((_label(arm) for arm in best if arm.outcomes[0].recipe.beta == 1), None)
    ended = len([o for o in outcomes if o.test is not None or o.diverged is not None])
    expected = len(lrs) * (settings.get("seeds") or 0) * _methods(settings)
    if ended < expected:
        told += f" Under way, or interrupted: {ended} of {expected} runs have ended."
    halted = any(run.ending is not None and run.ending.kind in ("interrupted", "failed") for run in members)
    over = ended >= expected or (halted and all(run.ended for run in members))
    if len(lrs) < 2:
        return [section(title, best, told, plain)], members, over
    chosen = f"Each method at its own best step size of γ ∈ {{{', '.join(map(shortest, lrs))}}}, by final validation. "
    whole = f"{told} Every method at every step size of the grid."
    return (
        [
            section(f"{title}: each method at its best step size", best, chosen + told, plain),
            section(f"{title}: the whole grid", arms, whole, None),
        ],
        members,
        over,
    )


def _methods(settings: Mapping[str, Any]) -> int:
    betas, firsts = settings.get("betas") or [], settings.get("first_steps") or []
    return sum(len(firsts) if beta < 1 else 1 for beta in betas)


def _label(arm: Arm) -> str:
    return f"{arm.label}, γ = {shortest(arm.lr)}"


def _outcome(found: Logged, steps: tuple[int, ...]) -> Outcome:
    recipe = Recipe.from_settings(found.settings, f"the run in {found.path}")
    ending = found.path / "outcome.json"
    ended = read_record(Ending, ending) if ending.exists() else Ending(None, None, None)
    diverged = found.run.diverged if ended.diverged is None else ended.diverged
    return Outcome(recipe, list(found.run.curve), steps, ended.test, ended.halfwidth, diverged, found.path)


def _joined(outcome: Outcome, logged: Mapping[Path, Logged]) -> SeedRun:
    """The log of a run with the results of its final evaluation."""
    run = logged[outcome.path].run
    tests = zip(outcome.steps, outcome.test or (), outcome.halfwidth or (), strict=False)
    return SeedRun(
        outcome.recipe.seed, run.curve, run.loss, tuple(tests), outcome.diverged, run.sent, run.exchanged, run.done
    )
