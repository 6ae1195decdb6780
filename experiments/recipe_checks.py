"""Checks of a recipe's options that go together: how workers take part, and the momentum with its schedules.

Each returns the options whose values it changes: those that change nothing become ``None``, as in runs of
earlier versions.
"""

from __future__ import annotations

import math
from typing import Any

from metamom.common.checks import check_whole
from metamom.experiments.options import RecipeOptions
from metamom.experiments.schedules import parse_beta_schedule, with_power
from metamom.maml.steps.federation import check_estimator, check_local, check_tasks
from metamom.server.down import as_down_bias
from metamom.server.part import normalised_weights
from metamom.server.participation import check_participation
from metamom.theory import variant_powers


def checked_federation(given: RecipeOptions) -> dict[str, Any]:
    """Check absent workers, their weights, local steps and the message to the workers.

    Raises:
        TypeError: for options of another kind.
        ValueError: for options out of range, or that do not go together.
    """
    changed: dict[str, Any] = {}
    if given.participation is not None and check_participation(given.participation) == 1:
        changed["participation"] = None
    normalised_weights(given.worker_weights, given.workers)
    steps = 1 if given.local_steps is None else check_whole("local_steps", given.local_steps, 1)
    if steps == 1:
        changed["local_steps"] = None
    if given.local_lr is not None and steps == 1:
        raise ValueError(
            f"local_lr is the step size of local steps: pass local_steps > 1 (--local-steps); got {given.local_lr}."
        )
    if steps > 1:
        check_estimator(given.estimator, steps)
        check_local(steps, 1.0 if given.local_lr is None else given.local_lr)
        check_tasks(given.meta_batch or given.workers, check_whole("workers", given.workers, 1), steps)
    if as_down_bias(given.down_bias) is None:
        changed["down_bias"] = None
    return changed


def checked_momentum(given: RecipeOptions) -> dict[str, Any]:
    """Check the outer step size of inner step sizes, the variant and the schedules, and fill in a variant's powers.

    Raises:
        ValueError: for options out of range, or that do not go together.
    """
    if given.inner_lr_lr is not None:
        if not 0 < given.inner_lr_lr < math.inf:
            raise ValueError(f"inner_lr_lr is a step size and must be > 0 and finite; got {given.inner_lr_lr}.")
        if given.learn_inner_lr is False:
            raise ValueError(
                "inner_lr_lr is the outer step size of learned inner step sizes: choose which to learn, with "
                'learn_inner_lr="tensor" (--learn-inner-lr tensor), or leave it out.'
            )
    powers = None if given.variant is None else variant_powers(given.variant)
    changed: dict[str, Any] = {"schedule": with_power(given.schedule, powers and powers.step)}
    beta = given.beta_schedule
    if beta is not None:
        text = with_power(beta, powers and powers.weight)
        beta = None if parse_beta_schedule(text).kind == "constant" else text
        changed["beta_schedule"] = beta
    for name, value in (("variant", given.variant), ("beta_schedule", beta)):
        if given.optimizer != "momentum" and value is not None:
            raise ValueError(f"{name} belongs to the optimizer momentum; got {value!r} with {given.optimizer}.")
    return changed
