"""Runs of any kind as sections of a page: grouped by their tasks, then by their settings into methods."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from metamom.experiments.families import FAMILIES
from metamom.experiments.families.family import ACCURACY, LOSS, Metric
from metamom.experiments.python_runs import is_python_run
from metamom.experiments.python_tasks import task_family
from metamom.experiments.recipes import Recipe
from metamom.experiments.report.contents import Method, Section, SeedRun
from metamom.experiments.report.logged import Logged
from metamom.experiments.shared.numerals import shortest

# losses of torch that are never negative: intervals of their means are cut off at zero
NONNEGATIVE = (
    "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "cross_entropy", "binary_cross_entropy",
    "binary_cross_entropy_with_logits", "MSELoss", "L1Loss", "SmoothL1Loss", "HuberLoss", "CrossEntropyLoss", "BCELoss",
    "BCEWithLogitsLoss",
)  # fmt: skip
LONGEST = 80  # characters of a label


def run_sections(runs: Sequence[Logged]) -> list[Section]:
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
        return (
            " ".join([str(described.get("family", "tasks")), *size]),
            ACCURACY if run.classifies else _loss(run),
            None,
        )
    family = FAMILIES.get(str(settings.get("task")))
    if family is None:
        raise ValueError(
            f"{run.path} is not a run of metamom train, compare or metamom.train: its config.json has no settings of "
            "them. Some commands keep other records."
        )
    return family.titled(settings.get("ways"), settings.get("shots")), family.metric, family.comparison.target


def _loss(run: Logged) -> Metric:
    """The loss of a run, which only some functions of a user's keep from being negative."""
    described = run.settings.get("loss")
    name = str(described.get("name")).partition("(")[0] if isinstance(described, dict) else ""
    never = not is_python_run(run.settings) or name in NONNEGATIVE
    return LOSS if never else LOSS._replace(least=-math.inf)


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
    text = f"{len(runs)} run{'s' * (len(runs) > 1)}, {done:,} of {asked:,} iterations done: {_ended(runs)}."
    baseline = _baseline(methods, list(groups.values()))
    return Section(title, metric, methods, target, text, baseline, loss=_loss(runs[0]))


def _ended(runs: Sequence[Logged]) -> str:
    """How runs ended, in words: of one run with the reason, else counted."""
    if len(runs) == 1:
        return runs[0].how.rstrip(".")
    counts = Counter(run.how.partition(": ")[0] for run in runs)
    return ", ".join(f"{count} {how}" for how, count in counts.most_common())


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
