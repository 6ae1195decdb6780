"""Few-shot evaluation on fresh tasks, with confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from metamom.batch import Sampler, TaskBatch, check_sampler, drawn, of_stream, takes_blocks
from metamom.common.checks import AT_ONCE, INNER_STEPS, check_number, check_whole
from metamom.common.choices import STATISTICS_OF, Norm
from metamom.common.intervals import normal_halfwidth
from metamom.common.kinds import named_type
from metamom.common.trees import Tree
from metamom.common.watching import Watched
from metamom.distributed import World, as_world, digest
from metamom.ensemble import Ensemble
from metamom.judging import judged, judged_by_protocol
from metamom.maml.batch_checks import check_batch
from metamom.maml.learner import MAML
from metamom.maml.misfits import asserts_explained
from metamom.maml.norm import check_norm, statistics_used
from metamom.maml.swapping import evaluating
from metamom.task_metrics import Metric, check_metric, name_of

BLOCK = 50  # tasks drawn and computed together


class Adaptable(Protocol):
    """A learner that `evaluate` takes: anything with these two methods, such as `metamom.MAML`.

    Both get batches of tasks. If it has a method ``parameters()``, batches are moved to the device of the first
    parameter, and floating-point tensors to its dtype. With an attribute ``loss_fn``, ``"loss"`` can be measured.

    Example:
        >>> class Mean:  # predicts the mean of the support targets
        ...     def adapt(self, support_x, support_y, *, steps):
        ...         return support_y.mean(1, keepdim=True)
        ...     def predict(self, state, x):
        ...         return state.expand(x.shape[0], x.shape[1], -1)
        >>> from metamom.tasks import Sinusoid
        >>> evaluate(Mean(), Sinusoid(), tasks=50, steps=(0,), metric="rmse").metric
        'rmse'
    """

    def adapt(self, support_x: Tree, support_y: Tree, *, steps: int) -> Any:
        """What the learner knows about each of T tasks after so many steps, in any form.

        Args:
            support_x: ``[T, S, ...]``, a tensor or a tree.
            support_y: ``[T, S, ...]``, or ``None``.
            steps: of adaptation, >= 0. A learner that does not take steps ignores it.
        """
        ...

    def predict(self, state: Any, x: Tree, /) -> Any:
        """Predictions ``[T, Q, ...]`` for ``x: [T, Q, ...]``, from what `adapt` returned for these tasks."""
        ...


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
    norm: Norm | None = None

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


@asserts_explained()
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
        metamom.maml.batch_checks.NonFiniteDataError: if predictions are not finite because the data is not.

    Example:
        >>> from torch.nn import functional as F
        >>> from metamom import nets
        >>> from metamom.tasks import Sinusoid
        >>> result = evaluate(MAML(nets.SinusoidMLP(), F.mse_loss), Sinusoid(), tasks=10, steps=(0, 1))
        >>> result.values.shape, result.metric
        (torch.Size([2, 10]), 'loss')

    Reference:
        The protocol of Finn, Abbeel, Levine (2017), section 5.2.
    """
    steps = _checked(learner, sampler, tasks, steps, confidence)
    check_metric(metric)
    learner = _with_options(learner, norm, inner_lr)
    source = of_stream(sampler, stream)
    world = as_world(world)
    if world.size > 1:
        asked = "".join(f", {name} {value}" for name, value in (("norm", norm), ("inner_lr", inner_lr)) if value)
        asked += "" if metric is None else f", metric {name_of(metric)}"
        world.doing = f"an evaluation of {tasks} tasks after {steps} steps, stream {stream}{asked}, at weights "
        world.doing += digest(_weights(learner))
    values = torch.zeros(len(steps) + 1, tasks, dtype=torch.float64)  # zero for tasks of others; last: the metric
    with world.together(), evaluating(), Watched(tasks, shown=world.first) as watchers:
        for first, part, after in _parts(source, tasks, world):
            if part is not None:
                check_batch(part)
                found = _of_block(learner, _moved(part, learner), steps, first, metric)
                values[:, first : first + part.num_tasks] = found
            if after < tasks:
                watchers.between(after)
    all_values, is_accuracy = world.all_reduce(values).split_with_sizes([len(steps), 1])
    halfwidth = normal_halfwidth(1 / math.sqrt(tasks), confidence) * all_values.std(dim=1)
    return Evaluation(
        steps,
        tuple(all_values.mean(1).tolist()),
        tuple(halfwidth.tolist()),
        all_values,
        name_of(metric) if metric is not None else "accuracy" if bool(is_accuracy.any()) else "loss",
        confidence,
        _statistics(learner),
    )


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
        >>> from metamom import nets
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
        >>> from metamom import nets
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


def _with_options(learner: Adaptable, norm: Norm | None, inner_lr: float | None) -> Adaptable:
    """The learner with other options for this evaluation.

    Raises:
        TypeError: for a learner that does not have them.
    """
    check_norm(norm)
    given = [name for name, value in (("norm", norm), ("inner_lr", inner_lr)) if value is not None]
    if not given:
        return learner
    if not isinstance(learner, MAML | Ensemble):
        raise TypeError(f"{' and '.join(given)} can be chosen for a metamom.MAML; got {named_type(learner)}.")
    return learner.like(norm=norm, inner_lr=inner_lr)


def _statistics(learner: Adaptable) -> Norm | None:
    """What the normalisations of a learner used, if it has any."""
    one = learner.learners[0] if isinstance(learner, Ensemble) else learner
    return statistics_used(one.model, one.norm) if isinstance(one, MAML) else None


def _weights(learner: Adaptable) -> list[Tensor]:
    """What a learner adapts from, as far as it can be seen."""
    if isinstance(learner, MAML):
        return list(learner.meta_parameters().values())
    parameters = getattr(learner, "parameters", None)
    return [p for p in parameters() if isinstance(p, Tensor)] if callable(parameters) else []


def _moved(batch: TaskBatch, learner: Adaptable) -> TaskBatch:
    """A batch on the learner's device and in its dtype."""
    like = next((p for p in _weights(learner) if p.is_floating_point()), None)
    return batch if like is None else batch.to(like.device, like.dtype)


def _of_block(
    learner: Adaptable, batch: TaskBatch, steps: Sequence[int], first: int, metric: str | Metric | None
) -> Tensor:
    """Values ``[len(steps) + 1, T]`` of T tasks, of which the first has the number ``first``.

    The last row is 1 where they are accuracies, and 0 where they are not.
    """
    values = torch.zeros(len(steps) + 1, batch.num_tasks, dtype=torch.float64)
    asked = batch, set(steps), first, metric
    of_steps = judged(learner, *asked) if isinstance(learner, MAML) else judged_by_protocol(learner, *asked)
    for step, found, is_accuracy in of_steps:
        values[-1] = float(is_accuracy)
        for row in (row for row, wanted in enumerate(steps) if wanted == step):
            values[row] = found.double().cpu()
    return values


def _parts(source: Sampler, tasks: int, world: World) -> Iterator[tuple[int, TaskBatch | None, int]]:
    """The parts that this process evaluates: the index of the first task, the part, and how many tasks are done then.

    Other processes evaluate theirs meanwhile. The last part may be ``None``, where none is left for this process.
    Parts are blocks of one meta-batch, as for processes. So the tasks do not depend on how many are computed together,
    or where. The whole meta-batch is drawn at once if the number of tasks has no divisor of a reasonable size (a
    prime, say), or if the sampler cannot return parts.
    """
    numbers = range(-(-tasks // BLOCK), tasks // max(1, BLOCK // 4) + 1)
    fair = (n for n in numbers if tasks % n == 0)
    blocks = next(fair, 1) if takes_blocks(source) else 1
    size = min(BLOCK, tasks // blocks)
    whole = None
    for number in range(world.rank, world.rank + -(-tasks // size), world.size):
        first, after = number * size, min(tasks, (number - world.rank + world.size) * size)
        if first >= tasks:
            yield first, None, after
            continue
        if whole is None and blocks > 1:
            part = drawn(source, 0, tasks, number, blocks, or_all=world.size == 1)
            if part.num_tasks < tasks:
                yield first, part, after
                continue
            whole = part  # the sampler accepts rank and world_size but ignores them
        if whole is None:
            whole = drawn(source, 0, tasks)
        check_batch(whole)
        if whole.num_tasks != tasks:
            raise ValueError(f"the sampler must return {tasks} tasks; got a batch of {whole.num_tasks}.")
        yield first, whole.part(first, first + size), after
