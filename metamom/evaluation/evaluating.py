"""Few-shot evaluation on fresh tasks, with confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from metamom.batch import Sampler, TaskBatch, check_sampler, of_stream
from metamom.common.checks import AT_ONCE, INNER_STEPS, check_number, check_whole
from metamom.common.choices import Norm
from metamom.common.intervals import normal_halfwidth
from metamom.common.kinds import named_type
from metamom.common.watching import Watched
from metamom.distributed import World, as_world, digest
from metamom.evaluation.adaptable import Adaptable, placed_as_weights, statistics_of, weights_of, with_options
from metamom.evaluation.ensemble import Ensemble
from metamom.evaluation.result import Evaluation
from metamom.evaluation.tasks import blocks_of_tasks
from metamom.judging import judged, judged_by_protocol, tasks_at_once
from metamom.maml.checks.batch_checks import check_batch
from metamom.maml.checks.misfits import asserts_explained
from metamom.maml.chunking import spans
from metamom.maml.learner import MAML
from metamom.maml.running.swapping import evaluating
from metamom.task_metrics import Metric, check_metric, name_of

ALIKE: tuple[Norm, ...] = ("batch", "support")  # tasks are adapted to alike


class Asked(NamedTuple):
    """What is evaluated: the arguments of `evaluate` that all learners share."""

    tasks: int
    steps: tuple[int, ...]
    confidence: float
    stream: str
    metric: str | Metric | None


@asserts_explained
def evaluate(
    learner: Adaptable,
    sampler: Sampler,
    *,
    tasks: int = 600,
    steps: Sequence[int] = (0, 1, 5, 10),
    confidence: float = 0.95,
    stream: str = "test",
    world: World | None = None,
    norm: Norm | None = None,
    inner_lr: float | None = None,
    metric: str | Metric | None = None,
) -> Evaluation:
    """Adapt to new tasks and evaluate on their query sets.

    The model runs in evaluation mode, so dropout is off. Batch normalisation uses the statistics that the learner's
    ``norm`` chooses, in either mode, unless ``norm`` is given here. Neither the learner nor any global state changes.

    Args:
        learner: the learner to evaluate: a `metamom.MAML`, one of `metamom.baselines`, or any `Adaptable`.
        sampler: the tasks. From a `metamom.TaskSampler`, such as metamom's own, they come from ``stream``, so that no
            training task is reused. Any other sampler is used unchanged, at step 0.
        tasks: T >= 2.
        steps: numbers of inner steps >= 0, in any order; 0 is before adaptation.
        confidence: level of the intervals, in (0, 1); 0.95 gives ``mean ± 1.96 s / sqrt(T)``.
        stream: which stream of the sampler's seed to draw from.
        world: the processes that share the tasks; one by default. All of them get the same result, bit for bit.
        norm: what batch normalisation uses in this evaluation (see `metamom.MAML`); by default the learner's choice.
            ``"batch"`` is transductive, ``"support"`` and ``"frozen"`` are inductive.
        inner_lr: the inner step size in this evaluation; by default the learner's.
        metric: ``"accuracy"``, ``"loss"``, ``"macro-f1"``, ``"rmse"`` or ``"calibration-error"`` (see
            `metamom.task_metrics`), or a function ``(predictions [Q, ...], targets [Q, ...]) -> number`` of one task,
            such as those of ``torchmetrics.functional`` (with `functools.partial`). By default accuracy where there
            are classes, else the loss.

    Returns:
        An `Evaluation`.

    Raises:
        TypeError: for arguments of the wrong type, and for a sampler that does not return a `TaskBatch`.
        ValueError: for an argument out of range, and for tasks that do not fit the model, the loss or the metric.
        metamom.maml.checks.batch_checks.NonFiniteDataError: if predictions are not finite because the data is not.

    Example:
        >>> from torch.nn import functional as F
        >>> from metamom import MAML, evaluate, nets
        >>> from metamom.tasks import Sinusoid
        >>> result = evaluate(MAML(nets.SinusoidMLP(), F.mse_loss), Sinusoid(), tasks=10, steps=(0, 1))
        >>> result.values.shape, result.metric
        (torch.Size([2, 10]), 'loss')

    Reference:
        The protocol of Finn, Abbeel, Levine (2017), section 5.2.
    """
    asked = Asked(tasks, _checked(learner, sampler, tasks, steps, confidence), confidence, stream, metric)
    [found] = _evaluated([with_options(learner, norm, inner_lr)], sampler, asked, world, norm, inner_lr)
    return found


@asserts_explained
def evaluate_norms(
    learner: MAML,
    sampler: Sampler,
    norms: Sequence[Norm] = ("batch", "support"),
    *,
    tasks: int = 600,
    steps: Sequence[int] = (0, 1, 5, 10),
    confidence: float = 0.95,
    stream: str = "test",
    metric: str | Metric | None = None,
) -> dict[Norm, Evaluation]:
    """The evaluations with several ``norm`` on the same tasks, as `evaluate` gives them one by one.

    ``"batch"`` and ``"support"`` differ in how queries are classified, not in how tasks are adapted to, so tasks are
    adapted to once.

    Args:
        learner: the learner to evaluate.
        sampler, tasks, steps, confidence, stream, metric: as in `evaluate`.
        norms: what batch normalisation uses: ``"batch"`` (transductive), ``"support"`` (inductive), or both.

    Returns:
        The evaluations by ``norm``, in the order given.

    Raises:
        TypeError, ValueError: as in `evaluate`.
        ValueError: for other norms, with which tasks are adapted to differently.
    """
    others = [norm for norm in norms if norm not in ALIKE]
    if others or not norms:
        raise ValueError(f"norms must be {' and '.join(map(repr, ALIKE))}, or one of them; got {norms!r}.")
    asked = Asked(tasks, _checked(learner, sampler, tasks, steps, confidence), confidence, stream, metric)
    learners = [with_options(learner, norm, None) for norm in norms]
    return dict(zip(norms, _evaluated(learners, sampler, asked), strict=True))


def _evaluated(
    learners: Sequence[Adaptable],
    sampler: Sampler,
    asked: Asked,
    world: World | None = None,
    norm: Norm | None = None,
    inner_lr: float | None = None,
) -> list[Evaluation]:
    """The evaluations of L learners that adapt alike and predict differently."""
    check_metric(asked.metric)
    tasks, steps, metric = asked.tasks, asked.steps, asked.metric
    source = of_stream(sampler, asked.stream)
    world = as_world(world)
    if world.size > 1:
        options = "".join(f", {name} {value}" for name, value in (("norm", norm), ("inner_lr", inner_lr)) if value)
        options += "" if metric is None else f", metric {name_of(metric)}"
        world.doing = f"an evaluation of {tasks} tasks after {steps} steps, stream {asked.stream}{options}, at weights "
        world.doing += digest(weights_of(learners[0]))
    # zero for tasks of others; the last row: the metric
    values = torch.zeros(len(learners), len(steps) + 1, tasks, dtype=torch.float64)
    with world.together(), evaluating(), Watched(tasks, shown=world.first) as watchers:
        for first, part, after in blocks_of_tasks(source, tasks, world):
            if part is not None:
                check_batch(part)
                found = _of_block(learners, placed_as_weights(part, learners[0]), steps, first, metric)
                values[:, :, first : first + part.num_tasks] = found
            if after < tasks:
                watchers.between(after)
    reduced = world.all_reduce(values)
    return [_result(learner, asked, of_one) for learner, of_one in zip(learners, reduced, strict=True)]


def _result(learner: Adaptable, asked: Asked, found: Tensor) -> Evaluation:
    """The evaluation from values ``[len(steps) + 1, T]``, the last row of which is 1 for accuracies."""
    values, is_accuracy = found.split_with_sizes([len(asked.steps), 1])
    halfwidth = normal_halfwidth(1 / math.sqrt(asked.tasks), asked.confidence) * values.std(dim=1)
    return Evaluation(
        asked.steps,
        tuple(values.mean(1).tolist()),
        tuple(halfwidth.tolist()),
        values,
        name_of(asked.metric) if asked.metric is not None else "accuracy" if bool(is_accuracy.any()) else "loss",
        asked.confidence,
        statistics_of(learner),
    )


def _checked(learner: object, sampler: object, tasks: int, steps: Iterable[int], confidence: float) -> tuple[int, ...]:
    """Check arguments of `evaluate`, and return the numbers of steps."""
    methods = [getattr(learner, name, None) for name in ("adapt", "predict")]
    if isinstance(learner, type) or not all(map(callable, methods)):
        kind = named_type(learner)
        raise TypeError(
            f"evaluate takes a learner, MAML(model, loss_fn, ...), or another one with methods adapt and predict; got "
            f"{kind}."
        )
    if check_whole("tasks", tasks, 0, AT_ONCE) < 2:
        raise ValueError(f"an interval needs at least 2 tasks; got tasks={tasks}.")
    if not isinstance(steps, Iterable):
        raise TypeError(f"steps are numbers of inner steps, such as steps=(0, 1, 5); got {steps!r}.")
    steps = tuple(steps)
    if not steps or min(check_whole("a number of inner steps", step, -math.inf, INNER_STEPS) for step in steps) < 0:
        raise ValueError(f"steps must be one or more numbers of inner steps >= 0; got {steps}.")
    check_number("confidence", confidence)
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1); got {confidence}. 95 % is 0.95.")
    check_sampler(sampler, "evaluate takes a sampler, which")
    return steps


def _of_block(
    learners: Sequence[Adaptable], batch: TaskBatch, steps: Sequence[int], first: int, metric: str | Metric | None
) -> Tensor:
    """Values ``[L, len(steps) + 1, T]`` of T tasks, of which the first has the number ``first``.

    The last row is 1 where they are accuracies, and 0 where they are not.
    """
    values = torch.zeros(len(learners), len(steps) + 1, batch.num_tasks, dtype=torch.float64)
    learner = learners[0]
    one = learner.learners[0] if isinstance(learner, Ensemble) else learner  # members adapt one after another
    size = tasks_at_once(one, batch, max(steps)) if isinstance(one, MAML) else None
    for start, stop in spans(batch.num_tasks, size, batch.num_tasks):
        asked = batch.part(start, stop), set(steps), first + start, metric
        own = [each for each in learners if isinstance(each, MAML)]
        judge = learner.judge if isinstance(learner, Ensemble) else None
        of_steps = judged(own, *asked) if own else judged_by_protocol(learner, *asked, judge)
        for step, found, is_accuracy in of_steps:
            values[:, -1] = float(is_accuracy)
            for row in (row for row, wanted in enumerate(steps) if wanted == step):
                values[:, row, start:stop] = found.double().cpu()
    return values
