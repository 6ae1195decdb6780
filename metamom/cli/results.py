"""What ``metamom evaluate`` prints and writes: tables, JSON and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from metamom.common.files import write_atomically
from metamom.common.numbers import plural

if TYPE_CHECKING:
    from metamom.evaluation import Difference, Evaluation


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
    write_atomically(Path(path), text.getvalue().encode())


def _values(result: Evaluation) -> dict[str, Any]:
    return {"steps": result.steps, "mean": result.mean, "halfwidth": result.halfwidth}


def _name(name: str, row: Row) -> str:
    steps = row.result.steps[0]
    return f"{name}, {steps} {plural(steps, 'step')}" if steps else name


def _after(steps: int) -> str:
    return f"minus the learner's after {steps} {plural(steps, 'step')}"
