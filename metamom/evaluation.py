"""Few-shot evaluation on fresh tasks, with confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from metamom.batch import Sampler, TaskBatch, check_sampler, drawn, of_stream, takes_blocks
from metamom.bias.checks import all_finite
from metamom.common.checks import AT_ONCE, INNER_STEPS, check_number, check_whole
from metamom.common.choices import Norm
from metamom.common.intervals import normal_halfwidth
from metamom.common.trees import leaves
from metamom.distributed import World, as_world, digest
from metamom.maml.batch_checks import check_batch, refuse_non_finite
from metamom.maml.features import shared_between_predictions
from metamom.maml.learner import MAML
from metamom.maml.misfits import asserts_explained
from metamom.maml.norm import check_norm, resolved
from metamom.maml.swapping import evaluating
from metamom.maml.task_weights import Params

BLOCK = 50  # tasks drawn and computed together


class Evaluation(NamedTuple):
    """A learner's performance on T tasks after each of k numbers of adaptation steps.

    Attributes:
        steps: the numbers of inner steps, ``k`` of them.
        mean: mean over the tasks, ``k`` values.
        halfwidth: half-width of the confidence interval, ``z s / sqrt(T)``, ``k`` values.
        values: every task's value, ``[k, T]``.
        metric: ``"accuracy"`` in [0, 1] for classification (`metamom.maml.metrics.accuracy`), else ``"loss"``.
        confidence: level of the intervals.
        norm: the statistics that batch normalisation used, if there is any: see `metamom.MAML`.
    """

    steps: tuple[int, ...]
    mean: tuple[float, ...]
    halfwidth: tuple[float, ...]
    values: Tensor
    metric: Literal["accuracy", "loss"]
    confidence: float
    norm: Norm = "batch"


@asserts_explained()
def evaluate(
    learner: MAML,
    sampler: Sampler,
    *,
    tasks: int = 600,
    steps: Sequence[int] = (0, 1, 5, 10),
    confidence: float = 0.95,
    stream: str = "test",
    world: World | None = None,
    norm: Norm | None = None,
) -> Evaluation:
    """Adapt to new tasks and evaluate on their query sets.

    The model runs in evaluation mode, so dropout is off. Batch normalisation uses the statistics that the learner's
    ``norm`` chooses, in either mode, unless ``norm`` is given here. Neither the learner nor any global state changes.

    Args:
        learner: the learner to evaluate.
        sampler: the tasks. From a `metamom.TaskSampler`, such as metamom's own, they come from ``stream``, so that no
            training task is reused. Any other sampler is used unchanged, at step 0.
        tasks: T >= 2.
        steps: numbers of inner steps >= 0, in any order; 0 is before adaptation.
        confidence: level of the intervals, in (0, 1); 0.95 gives ``mean ± 1.96 s / sqrt(T)``.
        stream: which stream of the sampler's seed to draw from.
        world: the processes that share the tasks; one by default. All of them get the same result, bit for bit.
        norm: what batch normalisation uses in this evaluation (see `metamom.MAML`); by default the learner's choice.
            ``"batch"`` is transductive, ``"support"`` and ``"frozen"`` are inductive.

    Returns:
        An `Evaluation`.

    Raises:
        TypeError: for arguments of the wrong type, and for a sampler that does not return a `TaskBatch`.
        ValueError: for an argument out of range, and for tasks that do not fit the model or the loss.
        metamom.maml.batch_checks.NonFiniteDataError: if predictions are not finite because the data is not.

    Reference:
        The protocol of Finn, Abbeel, Levine (2017), section 5.2.
    """
    steps = _checked(learner, sampler, tasks, steps, confidence)
    check_norm(norm)
    learner = learner if norm is None else learner.like(norm=norm)
    used = resolved(learner.model, learner.norm) or "batch"
    source = of_stream(sampler, stream)
    like = next(iter(learner.meta_parameters().values()))
    world = as_world(world)
    if world.size > 1:
        weights = digest(learner.meta_parameters().values())
        asked = "" if norm is None else f", norm {norm}"
        world.doing = (
            f"an evaluation of {tasks} tasks after {steps} steps, stream {stream}{asked}, at weights {weights}"
        )
    values = torch.zeros(len(steps) + 1, tasks, dtype=torch.float64)  # zero for tasks of others; last: the metric
    with world.together(), evaluating():
        count, parts = _parts(source, tasks, world)
        hidden = None if world.first else True
        bar = tqdm(parts, total=count, desc="evaluate", unit="block", leave=False, disable=hidden)
        for first, part in bar:
            check_batch(part)
            batch = part.to(like.device, like.dtype)
            found = _of_block(learner, batch, steps, first)
            values[:, first : first + batch.num_tasks] = found
    all_values, is_accuracy = world.all_reduce(values).split_with_sizes([len(steps), 1])
    halfwidth = normal_halfwidth(1 / math.sqrt(tasks), confidence) * all_values.std(dim=1)
    return Evaluation(
        steps,
        tuple(all_values.mean(1).tolist()),
        tuple(halfwidth.tolist()),
        all_values,
        "accuracy" if bool(is_accuracy.any()) else "loss",
        confidence,
        used,
    )


def _checked(learner: object, sampler: object, tasks: int, steps: Iterable[int], confidence: float) -> tuple[int, ...]:
    """Check arguments of `evaluate`, and return the numbers of steps."""
    if not isinstance(learner, MAML):
        raise TypeError(f"evaluate takes a learner, MAML(model, loss_fn, ...); got a {type(learner).__name__}.")
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


def _of_block(learner: MAML, batch: TaskBatch, steps: Sequence[int], first: int) -> Tensor:
    """Values ``[len(steps) + 1, T]`` of T tasks, of which the first has the number ``first``.

    The last row is 1 where they are accuracies, and 0 where they are losses.
    """
    values = torch.zeros(len(steps) + 1, batch.num_tasks, dtype=torch.float64)
    with shared_between_predictions(batch.support_x, batch.query_x):
        adapted = learner.trajectory(batch.support_x, batch.support_y, steps=max(steps), mask=batch.support_mask)
        for step, params in enumerate(adapted):
            if step not in steps:
                continue
            losses, right = _judged(learner, params, batch, first)
            values[-1] = float(right is not None)
            for row in (row for row, wanted in enumerate(steps) if wanted == step):
                values[row] = (losses if right is None else right).double().cpu()
    return values


@torch.no_grad()
def _judged(learner: MAML, params: Params, batch: TaskBatch, first: int) -> tuple[Tensor, Tensor | None]:
    """The query losses and accuracies of tasks, of which the first has the number ``first``; see `MAML.judge`."""
    support = {}
    if learner.norm == "support":
        support = {"support_x": batch.support_x, "support_mask": batch.support_mask}
    predictions = learner.predict(params, batch.query_x, batch.query_mask, **support)
    losses, right = learner.judge(params, predictions, batch.query_y, batch.query_mask)
    if not (all_finite(losses) and (right is None or all(map(all_finite, leaves(predictions))))):
        refuse_non_finite(batch, first)
    return losses, right


def _parts(source: Sampler, tasks: int, world: World) -> tuple[int, Iterator[tuple[int, TaskBatch]]]:
    """The number of parts that this process evaluates, and the parts, each with the index of its first task.

    Parts are blocks of one meta-batch, as for processes. So the tasks do not depend on how many are computed together,
    or where. The whole meta-batch is drawn at once if the number of tasks has no divisor of a reasonable size (a
    prime, say), or if the sampler cannot return parts.
    """
    numbers = range(-(-tasks // BLOCK), tasks // max(1, BLOCK // 4) + 1)
    fair = (n for n in numbers if tasks % n == 0)
    blocks = next(fair, 1) if takes_blocks(source) else 1
    size = min(BLOCK, tasks // blocks)
    mine = range(world.rank, -(-tasks // size), world.size)

    def parts() -> Iterator[tuple[int, TaskBatch]]:
        whole = drawn(source, 0, tasks) if blocks == 1 and mine else None
        for number in mine:
            first = number * size
            if whole is None:
                part = drawn(source, 0, tasks, number, blocks, or_all=world.size == 1)
                if part.num_tasks < tasks:
                    yield first, part
                    continue
                whole = part  # the sampler accepts rank and world_size but ignores them
            check_batch(whole)
            if whole.num_tasks != tasks:
                raise ValueError(f"the sampler must return {tasks} tasks; got a batch of {whole.num_tasks}.")
            yield first, whole.part(first, first + size)

    return len(mine), parts()
