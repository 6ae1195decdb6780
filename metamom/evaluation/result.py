"""The result of an evaluation: every task's value, their means and intervals."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from metamom.common.choices import STATISTICS_OF, Normalised


class Evaluation(NamedTuple):
    """A learner's performance on T tasks after each of k numbers of adaptation steps. Printed as a table.

    Attributes:
        steps: the numbers of inner steps, ``k`` of them.
        mean: mean over the tasks, ``k`` values.
        halfwidth: half-width of the confidence interval, ``z s / sqrt(T)``, ``k`` values.
        values: every task's value, ``[k, T]``.
        metric: ``"accuracy"`` in [0, 1] for classification (`metamom.maml.metrics.accuracy`), else ``"loss"``; or the
            one that was asked for.
        confidence: level of the intervals.
        norm: the statistics that batch normalisation used: see `metamom.MAML`. ``None`` if the model has none, or for
            a learner that is not a `metamom.MAML`.
    """

    steps: tuple[int, ...]
    mean: tuple[float, ...]
    halfwidth: tuple[float, ...]
    values: Tensor
    metric: str
    confidence: float
    norm: Normalised | None = None

    def __repr__(self) -> str:
        width = max(8, len(self.metric))
        lines = [f"{'steps':>5}  {self.metric:<{width}}  ± {100 * self.confidence:g} %"]
        for steps, mean, halfwidth in zip(self.steps, self.mean, self.halfwidth, strict=True):
            lines.append(f"{steps:>5}  {mean:<{width}.4f}  {halfwidth:.4f}")
        return "\n".join([*lines, f"({'; '.join([f'{self.values.shape[1]} tasks', *self.normalised])})"])

    @property
    def normalised(self) -> list[str]:
        """What batch normalisation used, in words; empty if there is none."""
        return [] if self.norm is None else [STATISTICS_OF[self.norm]]

    def at(self, steps: int) -> Evaluation:
        """The part of the result after this number of adaptation steps.

        Raises:
            ValueError: for a number that was not evaluated.
        """
        if steps not in self.steps:
            raise ValueError(f"the learner was evaluated after {', '.join(map(str, self.steps))} steps; got {steps}.")
        row = self.steps.index(steps)
        one = slice(row, row + 1)
        return self._replace(
            steps=self.steps[one], mean=self.mean[one], halfwidth=self.halfwidth[one], values=self.values[one]
        )
