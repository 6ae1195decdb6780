"""Measure the bias and variance of a meta-gradient estimator, by inner batch size and by source.

    from metamom.diagnostics.bias_meter import measure
    measure(learner, Sinusoid(shots=240, queries=50), inner_batches=(1, 2, 5, 10, 20))

Legend: R draws (workers' messages), T = R · (tasks of a worker) tasks, m inner batch in shots, d meta-parameters, C
bias operator, n workers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from metamom.batch import Sampler, TaskBatch, check_sampler, drawn, of_stream
from metamom.bias import Bias, BiasOperator, as_operator
from metamom.common.checks import AT_ONCE, MOST, check_number, check_whole
from metamom.common.intervals import Interval, Jackknife, norm, squared_norm, total_variance
from metamom.diagnostics.power_law import Slope, fit_slope
from metamom.diagnostics.sources import (
    estimator_parts,
    half_points,
    pairs,
    points_per_shot,
    population_gradients,
    reference,
    single_gradients,
)
from metamom.maml.estimators import memoryless_estimators
from metamom.maml.learner import MAML

STREAM = "bias"  # a stream of the sampler's seed that training, validation and test do not use
TRACKED_PAIRS = 4  # pairs to cut out of a pool during training
POINTS = 60_000  # rough number of query points to compute together


class Part(NamedTuple):
    """A bias, or one source's share of it.

    Attributes:
        squared: an unbiased estimate of its squared norm, which may be negative if the true value is zero.
        mean: the vector itself ``[d]``, with noise.
    """

    squared: Interval
    mean: Tensor

    @property
    def norm(self) -> Interval:
        """Its norm. The interval starts at 0 if zero is not excluded."""
        return norm(self.squared)

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval shows that there is a bias."""
        return self.squared.low > 0


class AtSize(NamedTuple):
    """The measurements at one inner batch size.

    Attributes:
        inner_batch: m.
        bias: the bias of a worker's message.
        sources: its parts by name (see `metamom.diagnostics.sources.estimator_parts`; ``"operator"`` is the mean of
            C(g) - g). Their means add up to the mean of the bias.
        variance: the trace of the covariance of one worker's message, over its tasks, inner batches and query points;
            the mean of n workers has 1/n of it.
    """

    inner_batch: int
    bias: Part
    sources: dict[str, Part]
    variance: Interval


class Measured(NamedTuple):
    """The result of `measure`.

    Attributes:
        sizes: one entry for each inner batch size, in order.
        slopes: slopes over m, for the estimator's bias (``"bias"``, without the operator's share) and for each source;
            ``None`` if zero is excluded at fewer than two sizes.
        gradient: norm of the reference, the gradient of f.
        reference: ``"population"`` if it is exact, else ``"pool"``, a large inner batch.
        correction: norm of the bias correction of the pool's reference. At most 1.4 times as much bias is left (see
            `metamom.diagnostics.sources.reference`). ``None`` for the population.
        estimator: its name.
        bias: spec of the operator C.
        draws: R.
        tasks_per_worker: tasks of one worker.
        pool: support shots of a task from which the inner batches were cut.
        confidence: level of all intervals.
    """

    sizes: tuple[AtSize, ...]
    slopes: dict[str, Slope | None]
    gradient: Interval
    reference: Literal["population", "pool"]
    correction: Interval | None
    estimator: str
    bias: str
    draws: int
    tasks_per_worker: int
    pool: int
    confidence: float


def measure(
    learner: MAML,
    sampler: Sampler,
    *,
    inner_batches: Sequence[int] = (1, 2, 5, 10, 20),
    bias: Bias = None,
    population: Sampler | None = None,
    draws: int = 200,
    tasks_per_worker: int = 1,
    queries: int | None = None,
    most_pairs: int | None = None,
    confidence: float = 0.95,
    label: str = "bias",
) -> Measured:
    """Measure the bias and variance of a worker's message, against the gradient of f at the learner's weights.

    ``bias(m) = E C(g_m) - grad f``, with g_m the learner's estimator on inner batches of m shots, and f the mean over
    tasks of the loss after adaptation to the whole population. Each task's pool of support points is cut into inner
    batches. These, other estimators on the same points, and the reference are all evaluated on the same query set.
    Squared norms come from products of different draws (`metamom.common.intervals.squared_norm`), so they are not
    inflated by noise and their intervals can cover zero. Intervals show the noise of the draws, but not the remaining
    bias of the pool's reference (``correction``).

    Args:
        learner: its model, weights, inner steps and estimator are measured. It does not change.
        sampler: tasks with pools as support sets: at least twice the inner batches of one adaptation, and 4 shots. From
            a `TaskSampler`, tasks come from stream ``"bias"``. Step r gives draw r.
        inner_batches: m >= 1, in shots: points a class for classification, else points.
        bias: the operator C on each worker's flattened gradient, or its SPEC, without error feedback.
        population: a sampler of the same tasks with their populations as support and query sets
            (`metamom.tasks.population.Population`), if known. The reference is then exact. A reference from the pool
            shares points with the inner batches, which cancels noise, so intervals with a population are wider for the
            same number of draws.
        draws: R >= 3, the number of workers' messages.
        tasks_per_worker: tasks that a worker averages over before C. Families of given tasks need a multiple of their
            number.
        queries: shots of the query set that a worker uses in training, for the variance and C; all if ``None``.
        most_pairs: the most pairs of inner batches to cut out of a pool; all if ``None``.
        confidence: level of all intervals, in (0, 1).
        label: label of the progress bar.

    Returns:
        A `Measured`.

    Raises:
        TypeError: for an argument of the wrong type.
        ValueError: for an argument out of range, a pool that does not hold two inner batches, or an operator with error
            feedback, since its bias depends on its history.

    Example:
        >>> from torch.nn import functional as F
        >>> from metamom import nets
        >>> from metamom.tasks import Sinusoid
        >>> learner = MAML(nets.SinusoidMLP(), F.mse_loss)
        >>> found = measure(learner, Sinusoid(shots=8), inner_batches=(1, 2), draws=4)
        >>> [at.inner_batch for at in found.sizes], list(found.sizes[0].sources)
        ([1, 2], ['curvature', 'coupling'])

    Reference:
        arXiv 2403.00853, the composite gradient; docs/theory.md, "Which source of bias, which cure".
    """
    if not isinstance(inner_batches, Iterable):
        raise TypeError(f"inner_batches are numbers of shots, such as (1, 2, 5); got {inner_batches!r:.80}.")
    operator, sizes = as_operator(bias), tuple(inner_batches)
    if most_pairs is not None:
        check_whole("most_pairs", most_pairs, 1)
    if population is not None:
        check_sampler(population, "population is a sampler, which")
    _check_plan(learner, operator, sizes, draws, tasks_per_worker, queries, confidence)
    like = next(learner.model.parameters())
    check_sampler(sampler, "measure takes a sampler, which")
    first = drawn(of_stream(sampler, STREAM), 0, tasks_per_worker)
    _check_pool(learner, first, sizes, queries)
    shot = points_per_shot(first)
    devices = [like.device] if like.device.type == "cuda" else []
    found = _Found()
    # random layers of a model (dropout) draw from torch's generators: restore them, so that training is unaffected
    with torch.random.fork_rng(devices):
        torch.default_generator.manual_seed(0)  # torch.manual_seed would also seed every GPU, which is not restored
        for device in devices:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(0)
        widest = first.support_x.shape[1] // (2 * half_points(learner, min(sizes), first))
        widest = widest if most_pairs is None else min(widest, most_pairs)
        at_once = max(1, POINTS // (2 * widest * first.query_x.shape[1] * tasks_per_worker))
        starts = range(0, draws, at_once)
        with tqdm(total=draws * len(sizes), desc=label, unit="draw", leave=False, disable=None) as bar:
            for start in starts:
                steps = range(start, min(start + at_once, draws))
                pool = _all_drawn(sampler, steps, tasks_per_worker).to(like.device, like.dtype)
                whole = None
                if population is not None:
                    whole = _all_drawn(population, steps, tasks_per_worker).to(like.device, like.dtype)
                found.add_reference(learner, pool, whole, tasks_per_worker)
                for m in sizes:
                    found.add(learner, pool, whole, m, operator, tasks_per_worker, queries, most_pairs, steps)
                    bar.update(len(steps))
    return Measured(
        tuple(found.at(m, confidence) for m in sizes),
        found.slopes(confidence),
        norm(squared_norm(torch.cat(found.targets)).interval(confidence)),
        "pool" if population is None else "population",
        norm(squared_norm(torch.cat(found.corrections)).interval(confidence)) if population is None else None,
        learner.estimator,
        "none" if operator is None else operator.spec,
        draws,
        tasks_per_worker,
        first.support_x.shape[1] // shot,
        confidence,
    )


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
    _check_plan(learner, operator, (plan.inner_batch,), plan.draws, plan.tasks_per_worker, plan.queries, 0.95)
    _check_pool(
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


class _Found:
    """The results of the draws so far, rows ``[R, d]`` in blocks."""

    def __init__(self) -> None:
        self.targets: list[Tensor] = []
        self.corrections: list[Tensor] = []
        self.parts: dict[int, dict[str, list[Tensor]]] = {}
        self.messages: dict[int, list[Tensor]] = {}
        self._of_tasks: Tensor | None = None

    def add_reference(self, learner: MAML, pool: TaskBatch, whole: TaskBatch | None, each: int) -> None:
        if whole is None:
            target, correction = reference(learner, pool)
            self.corrections.append(_means(correction, each))
        else:
            target = population_gradients(learner, whole)
        self._of_tasks = target
        self.targets.append(_means(target, each))

    def add(
        self,
        learner: MAML,
        pool: TaskBatch,
        whole: TaskBatch | None,
        m: int,
        operator: BiasOperator | None,
        each: int,
        queries: int | None,
        most: int | None,
        steps: range,
    ) -> None:
        assert self._of_tasks is not None
        # the query batch is independent of the inner one, so its mean (the population) can be taken first
        judged = pool if whole is None else pool._replace(query_x=whole.query_x, query_y=whole.query_y)
        parts = estimator_parts(learner, judged, m, self._of_tasks, most)
        rows = {name: _means(part, each) for name, part in parts.items()}
        message, sizes = single_gradients(learner, pool, m, queries, each)
        if operator is not None:
            sent = operator(message, step=0, workers=steps, sizes=sizes)
            rows["operator"] = sent.double() - message.double()
            message = sent
        kept = self.parts.setdefault(m, {})
        for name, values in rows.items():
            kept.setdefault(name, []).append(values)
        self.messages.setdefault(m, []).append(message.double())

    def slopes(self, confidence: float) -> dict[str, Slope | None]:
        """The slopes of the estimator's bias and its sources, without the operator."""
        curves: dict[str, dict[int, Jackknife]] = {}
        for m, parts in self.parts.items():
            kept = {name: blocks for name, blocks in parts.items() if name != "operator"}
            curves.setdefault("bias", {})[m] = squared_norm(self._total(kept))
            for name, blocks in kept.items():
                curves.setdefault(name, {})[m] = squared_norm(torch.cat(blocks))
        return {name: fit_slope(curve, confidence) for name, curve in curves.items()}

    def at(self, m: int, confidence: float) -> AtSize:
        parts = self.parts[m]
        sources = {name: _part(torch.cat(blocks), confidence) for name, blocks in parts.items()}
        variance = total_variance(torch.cat(self.messages[m])).interval(confidence)
        return AtSize(m, _part(self._total(parts), confidence), sources, variance)

    def _total(self, parts: dict[str, list[Tensor]]) -> Tensor:
        return torch.stack([torch.cat(blocks) for blocks in parts.values()]).sum(0)


def _part(rows: Tensor, confidence: float) -> Part:
    return Part(squared_norm(rows).interval(confidence), rows.mean(0))


def _means(rows: Tensor, each: int) -> Tensor:
    """Workers' means ``[T/each, d]`` over tasks ``[T, d]``."""
    return rows.reshape(-1, each, rows.shape[1]).mean(1)


def _all_drawn(sampler: Sampler, steps: range, each: int) -> TaskBatch:
    """The draws of these steps, concatenated."""
    source = of_stream(sampler, STREAM)
    batches = [drawn(source, step, each) for step in steps]
    return TaskBatch(*(torch.cat(fields) for fields in zip(*(batch[:4] for batch in batches), strict=True)))


def _check_plan(
    learner: MAML,
    operator: BiasOperator | None,
    sizes: tuple[int, ...],
    draws: int,
    each: int,
    queries: int | None,
    confidence: float,
) -> None:
    if not isinstance(learner, MAML):
        raise TypeError(f"wanted a learner, MAML(model, loss_fn, ...); got a {type(learner).__name__}.")
    if learner.estimator not in memoryless_estimators():
        raise ValueError(
            f"the estimators that a draw by itself shows the bias of are {', '.join(memoryless_estimators())}; got "
            f"{learner.estimator!r}, which remembers earlier steps. Measure one of these (--estimator) at its weights."
        )
    for size in sizes:
        check_whole("an inner batch", size, -math.inf, AT_ONCE)
    if not sizes or min(sizes) < 1 or len(set(sizes)) < len(sizes):
        raise ValueError(f"inner_batches are numbers of shots >= 1 that differ, at least one; got {sizes}.")
    if check_whole("draws", draws, -math.inf, AT_ONCE) < 3:
        raise ValueError(f"an interval needs at least 3 draws; got draws={draws}.")
    for name, value in (("tasks_per_worker", each), ("queries", queries)):
        if value is not None or name == "tasks_per_worker":
            check_whole(name, value, 1, AT_ONCE)
    check_number("confidence", confidence)
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1); got {confidence}. 95 % is 0.95.")
    if operator is not None and operator.feeds_back:
        raise ValueError(
            f"{operator.spec} feeds errors back: its bias depends on all that it was fed before, which no draw of it "
            "alone shows. Measure the operator within it, such as topk:5%."
        )


def _check_pool(learner: MAML, pool: TaskBatch, sizes: tuple[int, ...], queries: int | None) -> None:
    """Check the pool before anything is computed."""
    shot = points_per_shot(pool)
    if queries is not None and queries * shot > pool.query_x.shape[1]:
        raise ValueError(
            f"queries={queries} shots are more than the {pool.query_x.shape[1] // shot} that the sampler draws."
        )
    for m in sizes:
        pairs(pool, half_points(learner, m, pool))
