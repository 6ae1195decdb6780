"""Learners compared on the same tasks: their differences, task by task."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from metamom.batch import Sampler
from metamom.common.intervals import normal_halfwidth
from metamom.evaluation.adaptable import Adaptable
from metamom.evaluation.evaluating import evaluate
from metamom.evaluation.result import Evaluation


class Difference(NamedTuple):
    """The mean difference of two learners on the same tasks. Much of their common spread cancels.

    Attributes:
        steps: the numbers of adaptation steps of the first, ``k`` of them.
        mean: mean of first minus second over the tasks, ``k`` values.
        halfwidth: half-width of its confidence interval, ``k`` values.
        values: every task's difference, ``[k, T]``.
        confidence: level of the intervals.
    """

    steps: tuple[int, ...]
    mean: tuple[float, ...]
    halfwidth: tuple[float, ...]
    values: Tensor
    confidence: float

    def __repr__(self) -> str:
        lines = [f"{'steps':>5}  {'difference':<10}  ± {100 * self.confidence:g} %"]
        for steps, mean, halfwidth in zip(self.steps, self.mean, self.halfwidth, strict=True):
            lines.append(f"{steps:>5}  {mean:<+10.4f}  {halfwidth:.4f}")
        return "\n".join([*lines, f"({self.values.shape[1]} tasks)"])


def paired_difference(first: Evaluation, second: Evaluation) -> Difference:
    """Compare two evaluations of the same tasks: ``first - second``, task by task.

    Args:
        first: from `evaluate`.
        second: from `evaluate` with the same sampler, stream, number of tasks and metric. With a single number of
            steps, all of ``first``'s are compared with it: ``paired_difference(a, b.at(5))``.

    Raises:
        ValueError: for evaluations that differ in tasks, metric or steps.

    Example:
        >>> from torch.nn import functional as F
        >>> from metamom import MAML, evaluate, nets, paired_difference
        >>> from metamom.tasks import Sinusoid
        >>> result = evaluate(MAML(nets.SinusoidMLP(), F.mse_loss), Sinusoid(), tasks=10, steps=(0, 1))
        >>> paired_difference(result, result).mean
        (0.0, 0.0)
    """
    if first.metric != second.metric or first.values.shape[1] != second.values.shape[1]:
        raise ValueError(
            "a paired difference needs the same metric on the same tasks; got "
            f"{first.metric} on {first.values.shape[1]} tasks and {second.metric} on {second.values.shape[1]}."
        )
    if len(second.steps) > 1 and first.steps != second.steps:
        raise ValueError(
            f"both must have been evaluated after the same steps, or the second after one number of them; got "
            f"{first.steps} and {second.steps}. Choose one: second.at({second.steps[-1]})."
        )
    values = first.values - second.values
    error = values.std(dim=1) / math.sqrt(values.shape[1])
    halfwidth = normal_halfwidth(1.0, first.confidence) * error
    return Difference(first.steps, tuple(values.mean(1).tolist()), tuple(halfwidth.tolist()), values, first.confidence)


class Compared(NamedTuple):
    """Several learners on the same tasks. Printed as a table.

    Attributes:
        evaluations: of each learner, by name.
        differences: of each learner but the first, minus the first, by name.
    """

    evaluations: dict[str, Evaluation]
    differences: dict[str, Difference]

    def __repr__(self) -> str:
        reference, first = next(iter(self.evaluations.items()))
        width, metric = max(map(len, self.evaluations)), max(8, len(first.metric))
        minus, level = f"minus {reference}", f"± {100 * first.confidence:g} %"
        lines = [f"{'':<{width}}  steps  {first.metric:<{metric}}  {level:<8}  {minus}  {level}"]
        for name, each in self.evaluations.items():
            for row, steps in enumerate(each.steps):
                line = f"{name:<{width}}  {steps:>5}  {each.mean[row]:<{metric}.4f}  {each.halfwidth[row]:<8.4f}"
                if name in self.differences:
                    other = self.differences[name]
                    line += f"  {other.mean[row]:<+{len(minus)}.4f}  {other.halfwidth[row]:.4f}"
                lines.append(line.rstrip())
        return "\n".join([*lines, f"({first.values.shape[1]} tasks, the same for all)"])


def compare_learners(learners: Mapping[str, Adaptable], sampler: Sampler, **options: Any) -> Compared:
    """Evaluate several learners on the same tasks, with the paired differences from the first.

    Args:
        learners: by name; the others are compared with the first.
        sampler: the tasks.
        **options: of `evaluate`, for all of them.

    Raises:
        ValueError: for fewer than two learners.

    Example:
        >>> from torch.nn import functional as F
        >>> from metamom import MAML, compare_learners, nets
        >>> from metamom.tasks import Sinusoid
        >>> exact, first = (MAML(nets.SinusoidMLP(), F.mse_loss, inner_lr=lr) for lr in (0.01, 0.02))
        >>> found = compare_learners({"0.01": exact, "0.02": first}, Sinusoid(), tasks=10, steps=(1,))
        >>> list(found.differences)
        ['0.02']
    """
    if not isinstance(learners, Mapping) or len(learners) < 2:
        raise ValueError(f"a comparison needs at least two learners by name, {{name: learner}}; got {learners!r:.80}.")
    return paired({name: evaluate(learner, sampler, **options) for name, learner in learners.items()})


def paired(found: dict[str, Evaluation]) -> Compared:
    """Evaluations of the same tasks, by name, with the paired differences from the first."""
    reference, *others = found
    return Compared(found, {name: paired_difference(found[name], found[reference]) for name in others})
