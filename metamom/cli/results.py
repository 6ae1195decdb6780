"""What ``metamom evaluate`` prints and writes: tables, JSON and CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from metamom.common.files import write_atomically
from metamom.common.numbers import plural

if TYPE_CHECKING:
    import argparse

    from metamom.evaluation import Difference, Evaluation
    from metamom.loading import LoadedRun
    from metamom.maml.learner import MAML


class Row(NamedTuple):
    """A baseline's result, and its difference from the learner's on the same tasks."""

    result: Evaluation
    difference: Difference


def table(result: Evaluation, baselines: Mapping[str, Row]) -> list[str]:
    """The lines of a learner's table, and of its baselines'."""
    width = max(8, len(result.metric))
    lines = [f"{'steps':>5}  {result.metric:<{width}}  ± 95 %"]
    for steps, mean, halfwidth in zip(result.steps, result.mean, result.halfwidth, strict=True):
        lines.append(f"{steps:>5}  {mean:<{width}.4f}  {halfwidth:.4f}")
    if not baselines:
        return lines
    named = {_name(name, row): row for name, row in baselines.items()}
    first, minus = max(map(len, named)), _after(max(result.steps))
    lines += ["", f"{'baseline':<{first}}  {result.metric:<{width}}  ± 95 %  {minus}  ± 95 %"]
    for name, (found, difference) in named.items():
        own = f"{name:<{first}}  {found.mean[0]:<{width}.4f}  {found.halfwidth[0]:<6.4f}"
        lines.append(f"{own}  {difference.mean[0]:<+{len(minus)}.4f}  {difference.halfwidth[0]:.4f}")
    return lines


def as_json(result: Evaluation, baselines: Mapping[str, Row], *, per_task: bool, metric: bool) -> dict[str, Any]:
    """The result as JSON values; ``metric`` says whether to name it."""
    answer: dict[str, Any] = _values(result)
    answer["tasks"] = result.values.shape[1]
    if result.norm not in (None, "batch"):
        answer["norm"] = result.norm
    if metric:
        answer["metric"] = result.metric
    if per_task:
        answer["values"] = result.values.tolist()
    if baselines:
        answer["baselines"] = {
            name: {
                **_values(row.result),
                "difference": row.difference.mean,
                "difference_halfwidth": row.difference.halfwidth,
                **({"values": row.result.values.tolist()} if per_task else {}),
            }
            for name, row in baselines.items()
        }
    return answer


def write_record(path: str, answer: Mapping[str, Any], evaluated: Mapping[str, Any]) -> None:
    """Write a result with what was evaluated and how, for `metamom report`.

    Args:
        path: of the JSON file.
        answer: the result as JSON values.
        evaluated: what was asked for, by its name in words.

    Raises:
        OSError: if the file cannot be written.
    """
    from metamom.training.directory import environment

    found = {**answer, "evaluated": dict(evaluated), "environment": environment()}
    _write(path, json.dumps(found) + "\n")


def evaluated(
    runs: Mapping[str, LoadedRun],
    result: Evaluation,
    tasks: str,
    arguments: argparse.Namespace,
    members: Sequence[int] = (),
) -> dict[str, Any]:
    """What was evaluated and how, for the record: values by their names in words.

    Args:
        runs: by their paths; the tasks are the first one's.
        result: the first run's.
        tasks: in words.
        arguments: of the command.
        members: of an ensemble: the iterations of training before its checkpoints, the best first.
    """
    from metamom.experiments.python_tasks import task_family

    first = next(iter(runs.values()))
    seed = first.settings.get("seed", task_family(first.settings).get("seed"))
    own = first.recipe.family.metric if first.recipe is not None and arguments.metric is None else None
    named = own is not None and own.higher_is_better == (result.metric == "accuracy")
    asked = {
        "tasks": tasks,
        "split": arguments.split,
        "seed of the tasks": seed if arguments.seed is None else arguments.seed,
        "metric": own.name if own is not None and named else result.metric,
        "adaptation steps": list(result.steps),
        "inner step size": _step_size(first.learner, arguments.inner_lr),
        "normalisation": "; ".join(result.normalised) or None,
        "checkpoint": f"ensemble of the {len(members)} best" if members else arguments.checkpoint or "best",
        "iterations of training": list(members) or [run.step for run in runs.values()],
    }
    return {"runs": list(runs), **{name: value for name, value in asked.items() if value is not None}}


def _step_size(learner: MAML, asked: float | None) -> float | None:
    """The inner step size of the evaluation, if it is one number."""
    found = learner.inner_lr if asked is None else asked
    return found if isinstance(found, float) else None


def write_csv(path: str, results: Mapping[str, Evaluation]) -> None:
    """Write every task's value: a line for each learner, number of steps and task.

    Raises:
        OSError: if the file cannot be written.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["learner", "steps", "task", next(iter(results.values())).metric])
    for name, result in results.items():
        for steps, values in zip(result.steps, result.values.tolist(), strict=True):
            writer.writerows([name, steps, task, value] for task, value in enumerate(values))
    _write(path, text.getvalue())


def _write(path: str, text: str) -> None:
    """Write a file; its folder is made if there is none."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(Path(path), text.encode())


def _values(result: Evaluation) -> dict[str, Any]:
    return {"steps": result.steps, "mean": result.mean, "halfwidth": result.halfwidth}


def _name(name: str, row: Row) -> str:
    steps = row.result.steps[0]
    return f"{name}, {steps} {plural(steps, 'step')}" if steps else name


def _after(steps: int) -> str:
    return f"minus the learner's after {steps} {plural(steps, 'step')}"
