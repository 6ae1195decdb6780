"""Measure the bias and variance of a meta-gradient estimator, by inner batch size and by source.

    from metamom.diagnostics.bias_meter import measure
    measure(learner, Sinusoid(shots=240, queries=50), inner_batches=(1, 2, 5, 10, 20))

Legend: R draws (workers' messages), T = R · (tasks of a worker) tasks, m inner batch in shots, d meta-parameters, C
bias operator, n workers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from metamom.batch import Sampler, TaskBatch, check_sampler, drawn, of_stream
from metamom.bias import Bias, BiasOperator, as_operator
from metamom.common.checks import check_whole
from metamom.common.intervals import Interval, Jackknife, norm, squared_norm, total_variance
from metamom.diagnostics.checks import check_plan, check_pool
from metamom.diagnostics.power_law import Slope, fit_slope
from metamom.diagnostics.sources import (
    estimator_parts,
    half_points,
    points_per_shot,
    population_gradients,
    reference,
    single_gradients,
)
from metamom.maml.learner import MAML

STREAM = "bias"  # a stream of the sampler's seed that training, validation and test do not use
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

    def __repr__(self) -> str:
        lines = [f"{'m':>4}  bias      {100 * self.confidence:g} % interval"]
        for at in self.sizes:
            norm = at.bias.norm
            lines.append(f"{at.inner_batch:>4}  {norm.value:<8.3g}  {norm.low:.3g} to {norm.high:.3g}")
        about = f"norms; that of the gradient is {self.gradient.value:.3g}; estimator {self.estimator}"
        return "\n".join([*lines, f"({about}, operator {self.bias}, {self.draws} draws)"])


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
        arXiv 2403.00853, the composite gradient; docs/theory/maml.md, "MAML's gradients".
    """
    if not isinstance(inner_batches, Iterable):
        raise TypeError(f"inner_batches are numbers of shots, such as (1, 2, 5); got {inner_batches!r:.80}.")
    operator, sizes = as_operator(bias), tuple(inner_batches)
    if most_pairs is not None:
        check_whole("most_pairs", most_pairs, 1)
    if population is not None:
        check_sampler(population, "population is a sampler, which")
    check_plan(learner, operator, sizes, draws, tasks_per_worker, queries, confidence)
    like = next(learner.model.parameters())
    check_sampler(sampler, "measure takes a sampler, which")
    first = drawn(of_stream(sampler, STREAM), 0, tasks_per_worker)
    check_pool(learner, first, sizes, queries)
    shot = points_per_shot(first)
    plan = _Plan(learner, sampler, population, operator, sizes, draws, tasks_per_worker, queries, most_pairs)
    with _generators_of_ones_own(like.device):
        found = _draw(plan, first, label)
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


class _Plan(NamedTuple):
    """The checked arguments of `measure`, which explains them."""

    learner: MAML
    sampler: Sampler
    population: Sampler | None
    operator: BiasOperator | None
    inner_batches: tuple[int, ...]
    draws: int
    tasks_per_worker: int
    queries: int | None
    most_pairs: int | None


def _draw(plan: _Plan, first: TaskBatch, label: str) -> _Found:
    """Draw all messages, as many at a time as `POINTS` allows.

    Args:
        plan: what to measure.
        first: the first draw, for its sizes.
        label: label of the progress bar.
    """
    found, like = _Found(plan), next(plan.learner.model.parameters())
    widest = first.support_x.shape[1] // (2 * half_points(plan.learner, min(plan.inner_batches), first))
    widest = widest if plan.most_pairs is None else min(widest, plan.most_pairs)
    at_once = max(1, POINTS // (2 * widest * first.query_x.shape[1] * plan.tasks_per_worker))
    total = plan.draws * len(plan.inner_batches)
    with tqdm(total=total, desc=label, unit="draw", leave=False, disable=None) as bar:
        for start in range(0, plan.draws, at_once):
            steps = range(start, min(start + at_once, plan.draws))
            pool = _all_drawn(plan.sampler, steps, plan.tasks_per_worker).to(like.device, like.dtype)
            whole = None
            if plan.population is not None:
                whole = _all_drawn(plan.population, steps, plan.tasks_per_worker).to(like.device, like.dtype)
            found.add_reference(pool, whole)
            for m in plan.inner_batches:
                found.add(pool, whole, m, steps)
                bar.update(len(steps))
    return found


@contextmanager
def _generators_of_ones_own(device: torch.device) -> Iterator[None]:
    """Seed torch's generators, from which random layers (dropout) draw, and restore them afterwards."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.default_generator.manual_seed(0)  # torch.manual_seed would seed every GPU's, which nobody restores
        for each in devices:
            with torch.cuda.device(each):
                torch.cuda.manual_seed(0)
        yield


class _Found:
    """The results of the draws so far, rows ``[R, d]`` in blocks."""

    def __init__(self, plan: _Plan) -> None:
        self.plan = plan
        self.targets: list[Tensor] = []
        self.corrections: list[Tensor] = []
        self.parts: dict[int, dict[str, list[Tensor]]] = {}
        self.messages: dict[int, list[Tensor]] = {}
        self._of_tasks: Tensor | None = None

    def add_reference(self, pool: TaskBatch, whole: TaskBatch | None) -> None:
        each = self.plan.tasks_per_worker
        if whole is None:
            target, correction = reference(self.plan.learner, pool)
            self.corrections.append(_means(correction, each))
        else:
            target = population_gradients(self.plan.learner, whole)
        self._of_tasks = target
        self.targets.append(_means(target, each))

    def add(self, pool: TaskBatch, whole: TaskBatch | None, m: int, steps: range) -> None:
        plan = self.plan
        assert self._of_tasks is not None
        # the query batch is independent of the inner one, so its mean (the population) can be taken first
        judged = pool if whole is None else pool._replace(query_x=whole.query_x, query_y=whole.query_y)
        parts = estimator_parts(plan.learner, judged, m, self._of_tasks, plan.most_pairs)
        rows = {name: _means(part, plan.tasks_per_worker) for name, part in parts.items()}
        message, sizes = single_gradients(plan.learner, pool, m, plan.queries, plan.tasks_per_worker)
        if plan.operator is not None:
            sent = plan.operator(message, step=0, workers=steps, sizes=sizes)
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
