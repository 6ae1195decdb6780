"""Read what ``metamom evaluate`` and ``metamom compare RUN RUN`` write: JSON and CSV."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from metamom.common.intervals import normal_halfwidth, standard_error
from metamom.common.schema import LARGEST
from metamom.experiments.families.family import ACCURACY, Metric
from metamom.experiments.report.contents import NO_SEED, Measured, Method, Section, SeedRun

Results = dict[str, tuple[tuple[int, float, float | None], ...]]
RISING = ("macro-f1",)  # metrics besides accuracy of which more is better


def evaluation_sections(files: Sequence[Path]) -> list[Section]:
    """A section for each file with several learners, and one for all others with the same metric.

    Raises:
        ValueError: for a file that is not one of these commands'.
    """
    sections: list[Section] = []
    single: dict[str, list[Method]] = {}
    for file in files:
        name, results, measured, text = _read(file)
        if len(results) == 1:
            (test,) = results.values()
            known = [method.label for method in single.get(name, [])]
            label = file.stem if file.stem not in known else str(file)
            single.setdefault(name, []).append(_method(label, test))
            continue
        methods = tuple(_method(label, test) for label, test in results.items())
        baseline = methods[0].label if measured else None
        sections.append(Section(f"Evaluation: {file.stem}", metric_of(name), methods, None, text, baseline, measured))
    for name, alone in single.items():
        title = f"Evaluation: {alone[0].label}" if len(alone) == 1 else f"Evaluations: {name}"
        sections.append(Section(title, metric_of(name), tuple(alone)))
    return sections


def metric_of(name: str) -> Metric:
    """How to show a metric of `metamom.evaluate`."""
    return ACCURACY if name == "accuracy" else Metric(name, name, higher_is_better=name in RISING, digits=4)


def _method(label: str, test: tuple[tuple[int, float, float | None], ...]) -> Method:
    return Method(label, (SeedRun(NO_SEED, test=test),))


def _read(file: Path) -> tuple[str, Results, tuple[Measured, ...], str]:
    """The metric of a file, its learners' results, differences from the first, and a line on the tasks."""
    if not file.is_file():
        raise ValueError(f"{file} is not a file; name one that metamom evaluate --json or --csv has written.")
    if file.stat().st_size > LARGEST:
        raise ValueError(f"{file} has {file.stat().st_size:,} bytes; at most {LARGEST:,} are read.")
    try:
        text = file.read_text(encoding="utf-8")
        return _of_csv(text) if file.suffix == ".csv" else _of_json(json.loads(text))
    except (ValueError, KeyError, TypeError, IndexError, StopIteration, RecursionError) as error:
        raise ValueError(
            f"{file} is not what metamom evaluate --json or --csv writes, nor metamom compare RUN RUN --json "
            f"({type(error).__name__}: {error!s:.100}). Name such a file, or a run directory."
        ) from error


def _of_json(found: Mapping[str, Any]) -> tuple[str, Results, tuple[Measured, ...], str]:
    text = f"{int(found['tasks']):,} test tasks, the same for all; intervals are over tasks."
    name = str(found.get("metric", "result"))
    results: Results = {}
    measured = []
    if "runs" in found:  # of metamom compare RUN RUN
        for label, each in found["runs"].items():
            results[label] = _tests(each)
            gaps = zip(each["steps"], each.get("difference", ()), each.get("difference_halfwidth", ()), strict=False)
            measured += [Measured(label, int(at), float(mean), float(half)) for at, mean, half in gaps]
        return name, results, tuple(measured), text
    results["learner"] = _tests(found)
    last = max(found["steps"])
    for label, each in found.get("baselines", {}).items():
        results[label] = _tests(each)
        measured.append(Measured(label, last, float(each["difference"][0]), float(each["difference_halfwidth"][0])))
    return name, results, tuple(measured), text


def _tests(found: Mapping[str, Any]) -> tuple[tuple[int, float, float | None], ...]:
    rows = zip(found["steps"], found["mean"], found["halfwidth"], strict=True)
    return tuple((int(at), float(mean), float(half)) for at, mean, half in rows)


def _of_csv(text: str) -> tuple[str, Results, tuple[Measured, ...], str]:
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
    return name, results, tuple(measured), f"{len(wanted):,} test tasks, the same for all; intervals are over tasks."


def _mean(values: torch.Tensor) -> tuple[float, float]:
    """The mean over tasks and the half-width of its 95 % interval."""
    if len(values) < 2:
        raise ValueError("an interval needs at least 2 tasks")
    half = normal_halfwidth(float(standard_error(values)))
    if not math.isfinite(half):
        raise ValueError("a value is not finite")
    return float(values.mean()), half
