"""How long a recipe is trained: the papers' budgets, and what an hour on two cores allows. Needs no torch."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from metamom.experiments.published.recipes import Budget, Published

# Measured (docs/results/omniglot.md): 9,000 compiled iterations of 16 tasks, 5-way 1-shot with one query a class and
# one inner step, take 19.4 minutes on one thread. An inner step costs two passes of its images, queries one; where only
# the head adapts, the body sees every image once. This predicts the processor time of the other rows to within a third.
SECONDS_A_PASS = 19.4 * 60 / 9000 / 16 / (5 * 1 * 3)
SHORT_SECONDS = 2600  # of an hour; the rest is for compiling, validation, and machines that have other work
SHORT_SINUSOIDS = 10_000  # iterations; even the published 70,000 take minutes


class Length(NamedTuple):
    """The length of a run.

    Attributes:
        iterations: in all.
        meta_batch: tasks an iteration.
        schedule: of the outer step size, as ``metamom train --schedule`` takes it.
    """

    iterations: int
    meta_batch: int
    schedule: str


def length(published: Published, budget: Budget, ways: int | None, options: dict[str, Any]) -> Length:
    """The length of a run of a recipe.

    The short budget has half of the published tasks an iteration, and on Omniglot lowers the step size along half a
    cosine, since it ends before a constant one would be too large.

    Args:
        published: the recipe.
        budget: which one.
        ways: classes of a task; ``None`` for sinusoids.
        options: of the recipe, with its shots and queries.
    """
    tasks = published.meta_batch[ways].value
    schedule = options.get("schedule", "constant")
    if budget == "published":
        return Length(published.iterations.value, tasks, schedule)
    if ways is None:
        return Length(min(SHORT_SINUSOIDS, published.iterations.value), tasks, schedule)
    halved = max(1, tasks // 2)
    of_support = published.support_passes.get(ways) or 2 * options["inner_steps"]
    passes = ways * (of_support * options["shots"] + options["queries"])  # of one image, in a task
    allowed = SHORT_SECONDS / (SECONDS_A_PASS * halved * passes)
    return Length(min(_rounded_down(allowed), published.iterations.value), halved, "cosine")


def _rounded_down(value: float) -> int:
    """To two significant digits, so that the number can be remembered; at least 1."""
    unit = 10 ** max(0, math.floor(math.log10(max(value, 1))) - 1)
    return max(1, int(value // unit * unit))
