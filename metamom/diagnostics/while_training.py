"""Measure the bias from time to time while training."""

from __future__ import annotations

import math
from typing import NamedTuple

from metamom.batch import Sampler, check_sampler, drawn, of_stream
from metamom.bias import BiasOperator
from metamom.common.checks import MOST, check_whole
from metamom.diagnostics.bias_meter import STREAM, measure
from metamom.diagnostics.checks import check_plan, check_pool
from metamom.maml.learner import MAML

TRACKED_PAIRS = 4  # pairs to cut out of a pool during training


class TrackBias(NamedTuple):
    """Settings of ``train(track_bias=...)``, which measures the bias at one inner batch size from a few draws.

    Attributes:
        every: steps between measurements, from step 0 on, >= 1.
        pools: a sampler, as for `measure`.
        inner_batch: m, as in training.
        draws: R.
        tasks_per_worker: as in training.
        queries: as in training.
    """

    every: int
    pools: Sampler
    inner_batch: int
    draws: int = 16
    tasks_per_worker: int = 1
    queries: int | None = None


def check_track(learner: MAML, operator: BiasOperator | None, plan: TrackBias) -> None:
    """Check the arguments of `track`.

    Raises:
        TypeError: for anything but a `TrackBias`, or fields of the wrong type.
        ValueError: with what to change.
    """
    if not isinstance(plan, TrackBias):
        raise TypeError(
            f"track_bias takes a metamom.diagnostics.TrackBias(every, pools, inner_batch), or None; got {plan!r:.80}."
        )
    check_sampler(plan.pools, "TrackBias takes pools, a sampler, which")
    if check_whole("every", plan.every, -math.inf, MOST) < 1:
        raise ValueError(f"track_bias measures every N >= 1 steps; got every={plan.every}.")
    check_plan(learner, operator, (plan.inner_batch,), plan.draws, plan.tasks_per_worker, plan.queries, 0.95)
    check_pool(
        learner, drawn(of_stream(plan.pools, STREAM), 0, plan.tasks_per_worker), (plan.inner_batch,), plan.queries
    )


def track(learner: MAML, operator: BiasOperator | None, plan: TrackBias) -> dict[str, float]:
    """Take a measurement, in the form of a line of metrics.

    Returns:
        ``{"norm": ..., "low": ..., "high": ..., "gradient": ..., "variance": ...}``: the bias with its 95 % interval,
        the gradient's norm, and the variance of one worker's message.
    """
    found = measure(
        learner,
        plan.pools,
        inner_batches=(plan.inner_batch,),
        bias=operator,
        draws=plan.draws,
        tasks_per_worker=plan.tasks_per_worker,
        queries=plan.queries,
        most_pairs=TRACKED_PAIRS,
        label="track bias",
    )
    at = found.sizes[0]
    bias = at.bias.norm
    return {
        "norm": bias.value,
        "low": bias.low,
        "high": bias.high,
        "gradient": found.gradient.value,
        "variance": at.variance.value,
    }
