"""Read what a page shows: run directories, comparisons, and the files of evaluations."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from metamom.common.schema import read_record
from metamom.experiments.compare import Ending, Outcome
from metamom.experiments.families import FAMILIES
from metamom.experiments.families.family import ACCURACY, Metric
from metamom.experiments.python_runs import is_python_run
from metamom.experiments.python_tasks import task_family
from metamom.experiments.recipes import Recipe
from metamom.experiments.report.contents import Curve, Method, Page, Section, SeedRun
from metamom.experiments.report.evaluations import evaluation_sections
from metamom.experiments.report.markdown import Arm, arms_of, best_of_each
from metamom.experiments.report.summary import POINTS, averaged
from metamom.experiments.shared.numerals import shortest
from metamom.training.directory import read_config, read_log

LOSS = Metric("loss", "loss", higher_is_better=False, digits=3)
LONGEST = 80  # characters of a label
FILES = (".json", ".csv")  # of evaluations


class Logged(NamedTuple):
    """A run's ``config.json``, and what the page needs of its ``metrics.jsonl``."""

    path: Path
    config: dict[str, Any]
    run: SeedRun
    classifies: bool

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that define the run."""
        settings: dict[str, Any] = self.config["settings"]
        return settings

    @property
    def total(self) -> int:
        """Iterations that the run was asked for; 0 if its record does not say."""
        total = self.config["length"].get("iterations", 0)
        return total if isinstance(total, int) else 0


class Read(NamedTuple):
    """A page, and whether all of its runs have ended."""

    page: Page
    finished: bool


def read_page(paths: Sequence[str | Path]) -> Read:
    """Read runs, comparisons and evaluations.

    Args:
        paths: run directories of ``metamom train`` and `metamom.train`, directories of ``metamom compare``, and files
            of ``metamom evaluate --json`` or ``--csv``.

    Raises:
        ValueError: for anything else, naming it.
    """
    places = list(dict.fromkeys(Path(os.path.normpath(path)) for path in paths))
    sections: list[Section] = []
    runs: list[Logged] = []
    files: list[Path] = []
    environments: list[Mapping[str, Any]] = []
    finished = True
    for place in places:
        if place.suffix in FILES and not place.is_dir():
            files.append(place)
            continue
        config = _config(place)
        environments += [config["environment"]]
        if isinstance(config["settings"].get("base"), dict) and "betas" in config["settings"]:
            found, ended = _comparison(place, config["settings"])
            sections += found
            finished &= ended
        else:
            runs.append(read_run(place, config))
    sections += _sections(runs)
    finished &= all(run.run.diverged is not None or run.run.iterations >= run.total for run in runs)
    sections += evaluation_sections(files)
    name = places[0].name or str(places[0].resolve().name)
    title = sections[0].title if len(places) > 1 and len(sections) == 1 else name
    title = f"Report: {title}" if len(places) == 1 else f"Report: {len(places)} runs, {title}"
    return Read(Page(title, tuple(sections), environments=tuple(environments)), finished)


def read_run(path: Path, config: dict[str, Any]) -> Logged:
    """What a run has logged so far. Unreadable lines are left out, with a warning."""
    log = read_log(path)
    if log.damaged:
        count = len(log.damaged)
        lines_are = "line is" if count == 1 else "lines are"
        warnings.warn(f"{path / 'metrics.jsonl'}: {count} unreadable {lines_are} left out.", stacklevel=2)
    lines = log.lines
    done = lines[-1]["step"] + 1 if lines else 0
    losses = _curve(lines, "loss")
    last = lines[-1].get("loss") if lines else None
    broken = isinstance(last, float) and not math.isfinite(last)
    total = config["length"].get("iterations")
    longest = max(done, total if isinstance(total, int) else 0)
    run = SeedRun(
        seed=_seed(config["settings"], path),
        curve=_curve(lines, "validation"),
        loss=averaged(losses, math.ceil(longest / POINTS)),
        diverged=done if broken else None,
        sent=_total(lines, "wire_bytes"),
        exchanged=_total(lines, "sent_bytes"),
        done=done,
    )
    return Logged(path, config, run, any(_number(line.get("accuracy")) for line in lines))


def _config(place: Path) -> dict[str, Any]:
    if not place.exists():
        raise ValueError(f"{place} does not exist; a report is of run directories, or files of metamom evaluate.")
    if place.is_dir() and not (place / "config.json").exists():
        inside = sorted(each.parent.name for each in place.glob("*/config.json"))
        advice = f" It holds runs, such as {inside[0]}: name them, {place}/*." if inside else ""
        raise ValueError(f"{place} holds no run: there is no {place / 'config.json'}.{advice}")
    if not place.is_dir():
        raise ValueError(f"{place} is neither a run directory nor a .json or .csv file of metamom evaluate.")
    return read_config(place)


def _curve(lines: Iterable[Mapping[str, Any]], name: str) -> Curve:
    return tuple((line["step"] + 1, float(line[name])) for line in lines if _number(line.get(name)))


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _total(lines: Iterable[Mapping[str, Any]], name: str) -> int | None:
    values = [line[name] for line in lines if isinstance(line.get(name), int)]
    return sum(values) if values else None


def _seed(settings: Mapping[str, Any], path: Path) -> int | str:
    seed = settings.get("seed", task_family(settings).get("seed"))
    return seed if isinstance(seed, int) else path.name


# comparisons


def _comparison(place: Path, settings: Mapping[str, Any]) -> tuple[list[Section], bool]:
    """The sections of a comparison, and whether all of its runs have ended."""
    base = Recipe.from_settings(settings["base"], f"the comparison in {place}")
    steps = tuple(settings.get("steps") or ())
    outcomes, logged = [], {}
    for path in sorted((place / "runs").glob("*/config.json")):
        found = read_run(path.parent, read_config(path.parent))
        outcome = _outcome(found, steps)
        if found.run.curve or outcome.diverged is not None:
            outcomes.append(outcome)
            logged[path.parent] = found
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
    if len(lrs) < 2:
        return [section(title, best, told, plain)], ended >= expected
    chosen = f"Each method at its own best step size of γ ∈ {{{', '.join(map(shortest, lrs))}}}, by final validation. "
    whole = f"{told} Every method at every step size of the grid."
    return [
        section(f"{title}: each method at its best step size", best, chosen + told, plain),
        section(f"{title}: the whole grid", arms, whole, None),
    ], ended >= expected


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


# runs of any kind


def _sections(runs: Sequence[Logged]) -> list[Section]:
    """A section for each kind of task."""
    kinds: dict[tuple[str, str], list[Logged]] = {}
    for run in runs:
        title, metric, _ = _kind(run)
        kinds.setdefault((title, metric.name), []).append(run)
    return [_section(title, members) for (title, _), members in kinds.items()]


def _kind(run: Logged) -> tuple[str, Metric, float | None]:
    """The tasks of a run in words, its metric, and the target of its family."""
    settings = run.settings
    if is_python_run(settings):
        described = task_family(settings)
        ways, shots = described.get("ways"), described.get("shots")
        size = [f"{ways}-way"] * bool(ways) + [f"{shots}-shot"] * bool(shots)
        return " ".join([str(described.get("family", "tasks")), *size]), ACCURACY if run.classifies else LOSS, None
    family = FAMILIES.get(str(settings.get("task")))
    if family is None:
        raise ValueError(
            f"{run.path} is not a run of metamom train, compare or metamom.train: its config.json has no settings of "
            "them. Some commands keep other records."
        )
    return family.titled(settings.get("ways"), settings.get("shots")), family.metric, family.comparison.target


def _section(title: str, runs: Sequence[Logged]) -> Section:
    _, metric, target = _kind(runs[0])
    groups: dict[str, list[Logged]] = {}
    for run in runs:
        groups.setdefault(json.dumps(_defining(run.settings), sort_keys=True), []).append(run)
    labels = _labels([members[0] for members in groups.values()])
    if len(groups) == 1:
        labels = [runs[0].path.name if len(runs) == 1 else "all runs"]
    methods = tuple(
        Method(label, _numbered([member.run for member in members]))
        for label, members in zip(labels, groups.values(), strict=True)
    )
    if not any(run.curve for method in methods for run in method.runs):
        target = None
    done = sum(run.run.iterations for run in runs)
    asked = sum(max(run.total, run.run.iterations) for run in runs)
    text = f"{len(runs)} run{'s' * (len(runs) > 1)}, {done:,} of {asked:,} iterations done."
    return Section(title, metric, methods, target, text, _baseline(methods, list(groups.values())))


def _baseline(methods: Sequence[Method], groups: Sequence[Sequence[Logged]]) -> str | None:
    """Plain meta-SGD where it is one of the methods, else the first method."""
    if len(methods) < 2:
        return None
    plain = (
        method.label
        for method, members in zip(methods, groups, strict=True)
        if members[0].settings.get("beta") == 1 and members[0].settings.get("optimizer") == "momentum"
    )
    return next(plain, methods[0].label)


def _numbered(runs: Sequence[SeedRun]) -> tuple[SeedRun, ...]:
    """Runs with seeds that differ: ``0``, ``0 (2)`` where one was used twice."""
    used: dict[int | str, int] = {}
    found = []
    for run in runs:
        used[run.seed] = used.get(run.seed, 0) + 1
        again = used[run.seed]
        found.append(run if again == 1 else SeedRun(**{**vars(run), "seed": f"{run.seed} ({again})"}))
    return tuple(found)


def _defining(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that tell methods apart, flat: not the seed, nor where and how a run is computed."""
    left_out = {"seed", *Recipe.free()}
    whole = {name: value for name, value in settings.items() if name not in ("code", "contents", "validation")}
    return {name: value for name, value in _flat(whole) if name.rpartition(".")[2] not in left_out}


def _flat(value: Any, name: str = "") -> Iterable[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, each in value.items():
            yield from _flat(each, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list) and any(isinstance(each, dict) for each in value):
        for number, each in enumerate(value):
            yield from _flat(each, f"{name}[{number}]")
    else:
        yield name, value


def _labels(firsts: Sequence[Logged]) -> list[str]:
    """A label for each method: the settings that differ."""
    settings = [_defining(run.settings) for run in firsts]
    names = dict.fromkeys(name for each in settings for name in each)
    differ = [name for name in names if len({json.dumps(each.get(name)) for each in settings}) > 1]
    short = [name.rpartition(".")[2] for name in differ]
    words = [last if short.count(last) == 1 else name for name, last in zip(differ, short, strict=True)]
    labels: list[str] = []
    for each in settings:
        label = ", ".join(f"{word} = {_text(each.get(name))}" for name, word in zip(differ, words, strict=True))
        label = label if len(label) <= LONGEST else label[: LONGEST - 1] + "…"
        labels.append(label if label not in labels else f"{label} ({len(labels) + 1})")
    return labels


def _text(value: Any) -> str:
    text = shortest(value) if isinstance(value, float) else str(value)
    return text if len(text) <= 30 else text[:29] + "…"
