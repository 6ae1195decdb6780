"""Read what ``metamom evaluate`` and ``metamom compare RUN RUN`` write: JSON and CSV."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from metamom.common.intervals import normal_halfwidth, standard_error
from metamom.common.schema import LARGEST
from metamom.experiments.families.family import ACCURACY, MEAN_SQUARED_ERROR, Metric
from metamom.experiments.report.contents import NO_SEED, Measured, Method, Section, SeedRun

Results = dict[str, tuple[tuple[int, float, float | None], ...]]
RISING = ("macro-f1",)  # metrics besides accuracy of which more is better
UNNAMED = "accuracy or loss"  # of a file that does not name its metric: one of these two is the default


class Evaluations(NamedTuple):
    """What a page shows of the files of evaluations.

    Attributes:
        sections: one for each file with several learners, and one for all others on the same tasks.
        environments: where they were computed, of those that say so.
        facts: what was asked for, a name and a value for each file.
    """

    sections: tuple[Section, ...]
    environments: tuple[Mapping[str, Any], ...]
    facts: tuple[tuple[str, str], ...]


class File(NamedTuple):
    """A file that was read.

    Attributes:
        path: of the file.
        metric: its name.
        results: of each learner.
        measured: differences from the first learner.
        tasks: their number.
        evaluated: what was asked for, as `metamom evaluate --record` writes it; empty in other files.
        environment: the command, versions and hardware; empty in other files.
    """

    path: Path
    metric: str
    results: Results
    measured: tuple[Measured, ...]
    tasks: int
    evaluated: Mapping[str, Any]
    environment: Mapping[str, Any]

    @property
    def of(self) -> str:
        """What was evaluated: the runs, as far as the file says."""
        runs = [str(run) for run in self.evaluated.get("runs", ())]
        return " and ".join(runs) if 0 < len(runs) < 4 else f"{len(runs)} runs" if runs else self.path.stem

    @property
    def on(self) -> str:
        """The tasks in words; empty where the file does not say."""
        return str(self.evaluated.get("tasks", ""))

    @property
    def text(self) -> str:
        """A line on the tasks."""
        split = self.evaluated.get("split", "test")
        kind = "tasks of split " + str(split) if split != "test" else "test tasks"
        return f"{self.tasks:,} {kind}, the same for all; intervals are over tasks."


def read_evaluations(paths: Sequence[Path]) -> Evaluations:
    """Read files of evaluations.

    Raises:
        ValueError: for a file that is not one of these commands'.
    """
    files = [_read(path) for path in paths]
    sections = []
    alone: dict[tuple[str, ...], list[File]] = {}
    for file in files:
        if len(file.results) == 1:
            same = (file.metric, *(str(file.evaluated.get(name)) for name in ("tasks", "split", "seed of the tasks")))
            alone.setdefault(same, []).append(file)
        else:
            own = file.of if "learner" in file.results and file.evaluated else "learner"
            methods = tuple(_method(own if at == "learner" else at, test) for at, test in file.results.items())
            baseline = methods[0].label if file.measured else None
            title = f"Evaluation: {file.of}{' on ' * bool(file.on)}{file.on}"
            sections.append(
                Section(title, metric_of(file.metric), methods, None, file.text, baseline, file.measured)
            )  # fmt: skip
    sections += [_of_single(members) for members in alone.values()]
    environments = tuple(file.environment for file in files if file.environment)
    return Evaluations(tuple(sections), environments, tuple(fact for file in files for fact in _facts(file)))


def _of_single(files: Sequence[File]) -> Section:
    """Evaluations of one learner each, on the same tasks as far as they say."""
    labels = [file.of for file in files]
    if len(set(labels)) < len(labels):
        labels = [str(file.path) for file in files]
    first = files[0]
    on = f" on {first.on}" if first.on else ""
    title = f"Evaluation: {labels[0]}{on}" if len(files) == 1 else f"Evaluations{on or f': {first.metric}'}"
    methods = (_method(label, *file.results.values()) for label, file in zip(labels, files, strict=True))
    text = first.text if len(files) == 1 or first.on else ""
    return Section(title, metric_of(first.metric), tuple(methods), None, text.replace(", the same for all", ""))


def _facts(file: File) -> Iterator[tuple[str, str]]:
    """What was asked for, for the page's last part."""
    if not file.environment:
        yield (
            "not recorded",
            f"how {file.path.name} was made: metamom evaluate --record FILE writes a file that says so",
        )
    for name, value in file.evaluated.items():
        shown = ", ".join(dict.fromkeys(map(str, value))) if isinstance(value, list) else str(value)
        yield name.replace("_", " "), shown
    yield "number of tasks", f"{file.tasks:,}"


def metric_of(name: str) -> Metric:
    """How to show a metric of `metamom.evaluate`."""
    known = {each.name: each for each in (ACCURACY, MEAN_SQUARED_ERROR)}
    return known.get(name) or Metric(name, name, higher_is_better=name in RISING, digits=4)


def _method(label: str, test: tuple[tuple[int, float, float | None], ...]) -> Method:
    return Method(label, (SeedRun(NO_SEED, test=test),))


def _read(path: Path) -> File:
    """Read one file."""
    if not path.is_file():
        raise ValueError(f"{path} is not a file; name one that metamom evaluate --json, --csv or --record has written.")
    if path.stat().st_size > LARGEST:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes; at most {LARGEST:,} are read.")
    try:
        text = path.read_text(encoding="utf-8")
        return _of_csv(path, text) if path.suffix == ".csv" else _of_json(path, json.loads(text))
    except (ValueError, KeyError, TypeError, IndexError, StopIteration, RecursionError, AttributeError) as error:
        raise ValueError(
            f"{path} is not what metamom evaluate --json or --csv writes, nor metamom compare RUN RUN --json "
            f"({type(error).__name__}: {error!s:.100}). Name such a file, or a run directory."
        ) from error


def _of_json(path: Path, found: Mapping[str, Any]) -> File:
    evaluated, environment = dict(found.get("evaluated", {})), dict(found.get("environment", {}))
    results: Results = {}
    measured = []
    if "runs" in found:  # of metamom compare RUN RUN
        for label, each in found["runs"].items():
            results[label] = _tests(each)
            gaps = zip(each["steps"], each.get("difference", ()), each.get("difference_halfwidth", ()), strict=False)
            measured += [Measured(label, int(at), float(mean), float(half)) for at, mean, half in gaps]
    else:
        results["learner"] = _tests(found)
        last = max(found["steps"])
        for label, each in found.get("baselines", {}).items():
            results[label] = _tests(each)
            gap, half = each["difference"][0], each["difference_halfwidth"][0]
            measured.append(Measured(label, last, float(gap), float(half)))
    above = any(mean > 1 for test in results.values() for _, mean, _ in test)
    name = str(evaluated.get("metric") or found.get("metric") or ("loss" if above else UNNAMED))
    return File(path, name, results, tuple(measured), int(found["tasks"]), evaluated, environment)


def _tests(found: Mapping[str, Any]) -> tuple[tuple[int, float, float | None], ...]:
    rows = zip(found["steps"], found["mean"], found["halfwidth"], strict=True)
    return tuple((int(at), float(mean), float(half)) for at, mean, half in rows)


def _of_csv(path: Path, text: str) -> File:
    rows = csv.reader(text.splitlines())
    *head, name = next(rows)
    if head != ["learner", "steps", "task"]:
        raise ValueError(f"its columns should be learner, steps, task and a metric; got {', '.join([*head, name])}")
    values: dict[str, dict[int, list[float]]] = {}
    for learner, steps, _, value in rows:
        values.setdefault(learner, {}).setdefault(int(steps), []).append(float(value))
    results: Results = {
        learner: tuple((at, *_mean(torch.tensor(each, dtype=torch.float64))) for at, each in by_steps.items())
        for learner, by_steps in values.items()
    }
    first = next(iter(values.values()))
    last = max(first)
    wanted = torch.tensor(first[last], dtype=torch.float64)
    measured = []
    for learner, by_steps in list(values.items())[1:]:
        theirs = torch.tensor(by_steps[max(by_steps)], dtype=torch.float64)
        measured.append(Measured(learner, last, *_mean(theirs - wanted)))
    return File(path, name, results, tuple(measured), len(wanted), {}, {})


def _mean(values: torch.Tensor) -> tuple[float, float]:
    """The mean over tasks and the half-width of its 95 % interval."""
    if len(values) < 2:
        raise ValueError("an interval needs at least 2 tasks")
    half = normal_halfwidth(float(standard_error(values)))
    if not math.isfinite(half):
        raise ValueError("a value is not finite")
    return float(values.mean()), half
