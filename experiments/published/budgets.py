"""How long a recipe is trained: the papers' budgets, and what an hour on two cores allows. Needs no torch."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from metamom.experiments.published.record import WITHIN_ALPHABET, Budget, Published

# Measured (docs/results/omniglot.md): 9,000 compiled iterations of 16 tasks, 5-way 1-shot with one query a class and
# one inner step, take 19.4 minutes on one thread. An inner step costs two passes of its images, queries one; where only
# the head adapts, the body sees every image once. This predicts the processor time of the other rows to within a third.
SECONDS_A_PASS = 19.4 * 60 / 9000 / 16 / (5 * 1 * 3)
EVALUATED = 0.5  # of that, a pass that nothing is differentiated through: measured 0.3 to 0.7 on the four rows
HOUR = 3600  # on one thread; a second one is a reserve for compiling, and for machines that have other work
SHORT_SECONDS = 2600  # of training, at most
SHORT_SINUSOIDS = 10_000  # iterations; even the published 70,000 take minutes
TEST_TASKS = 1000
VALIDATING = 0.2  # of training's time, at most
VALIDATIONS = 40  # in a run, at most
FEW_VALIDATIONS = 10  # where each would take long
FEW_TASKS = 10


class Validations(NamedTuple):
    """The validations during a run.

    Attributes:
        every: iterations between them.
        tasks: of each.
    """

    every: int
    tasks: int


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


class Cost(NamedTuple):
    """Processor time of one task in seconds, on one thread.

    Attributes:
        trained: of its meta-gradient.
        evaluated: of its evaluation, after each number of steps that is tested.
    """

    trained: float
    evaluated: float


def cost(published: Published, ways: int, options: dict[str, Any]) -> Cost:
    """What a task of ``ways`` classes costs.

    Args:
        published: the recipe.
        ways: classes of a task.
        options: of the recipe, with its shots and queries.
    """
    shots, queries = options["shots"], options["queries"]
    of_support = published.support_passes.get(ways) or 2 * options["inner_steps"]
    of_class = published.class_passes.get(ways, 0)
    trained = SECONDS_A_PASS * ways * (of_support * shots + of_class + queries)
    if of_class:  # a solver's iterations are never differentiated through, so they cost the same in an evaluation
        return Cost(trained, trained)
    steps = {0, options["inner_steps"], published.test_steps[ways].value}
    return Cost(trained, EVALUATED * SECONDS_A_PASS * ways * (2 * max(steps) * shots + len(steps) * queries))


def length(published: Published, budget: Budget, ways: int | None, options: dict[str, Any]) -> Length:
    """The length of a run of a recipe.

    The short budget has half of the published tasks an iteration, and on Omniglot lowers the step size along half a
    cosine, since it ends before a constant one would be too large. Training, validations and tests take an hour.

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
    of_task = cost(published, ways, options)
    tested = TEST_TASKS * (2 if ways in WITHIN_ALPHABET else 1)
    seconds = min(SHORT_SECONDS, (HOUR - tested * of_task.evaluated) / (1 + VALIDATING))
    allowed = seconds / (of_task.trained * halved)
    return Length(min(_rounded_down(allowed), published.iterations.value), halved, "cosine")


def validations_during(
    published: Published, ways: int | None, options: dict[str, Any], iterations: int, tasks: int
) -> Validations:
    """The validations during a run: at most 40, and fewer on fewer tasks where they would take long beside training.

    They come no more often than training has had as many tasks as one of them.

    Args:
        published: the recipe.
        ways: classes of a task; ``None`` for sinusoids.
        options: of the recipe, with its shots, queries and meta-batch.
        iterations: of the run.
        tasks: of each validation, at most.
    """
    number = VALIDATIONS
    if ways is not None:
        of_task = cost(published, ways, options)
        allowed = VALIDATING * iterations * options["meta_batch"] * of_task.trained / of_task.evaluated  # tasks in all
        number = min(VALIDATIONS, max(FEW_VALIDATIONS, int(allowed / tasks)))
        tasks = min(tasks, max(FEW_TASKS, int(allowed / number)))
    return Validations(max(1, iterations // number, tasks // options["meta_batch"]), tasks)


def _rounded_down(value: float) -> int:
    """To two significant digits, so that the number can be remembered; at least 1."""
    unit = 10 ** max(0, math.floor(math.log10(max(value, 1))) - 1)
    return max(1, int(value // unit * unit))
