"""Few-shot evaluation on fresh tasks, with confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import NormalDist
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from metamom.batch import Sampler
from metamom.maml import MAML
from metamom.metrics import accuracy

BLOCK = 50  # tasks drawn and computed together


class Evaluation(NamedTuple):
    """A learner's quality after each number of adaptation steps; k of them, T tasks.

    Attributes:
        steps: the numbers of inner steps, ``k`` of them.
        mean: over the tasks, ``k`` values.
        halfwidth: of the confidence interval, ``z s / sqrt(T)``, ``k`` values.
        values: every task's value, ``[k, T]``.
        metric: ``"accuracy"`` in [0, 1] for classification, else ``"loss"``.
        confidence: of the intervals.
    """

    steps: tuple[int, ...]
    mean: tuple[float, ...]
    halfwidth: tuple[float, ...]
    values: Tensor
    metric: Literal["accuracy", "loss"]
    confidence: float


def evaluate(
    learner: MAML,
    sampler: Sampler,
    *,
    tasks: int = 600,
    steps: Sequence[int] = (0, 1, 5, 10),
    confidence: float = 0.95,
    stream: str = "test",
) -> Evaluation:
    """Adapt to fresh tasks and judge on their query sets.

    The model is in evaluation mode meanwhile, so dropout is off. Batch normalisation uses the statistics of the set at
    hand (transductive, as in MAML). Neither the learner nor any global state is changed.

    Args:
        learner: what `train` trained.
        sampler: the tasks. Metamom's own are asked for their ``stream``, so that no training task comes back; any
            other sampler is asked as it is, for its step 0.
        tasks: T >= 2.
        steps: numbers of inner steps >= 0, in any order; 0 is before adaptation.
        confidence: of the intervals, in (0, 1); 0.95 gives ``mean ± 1.96 s / sqrt(T)``.
        stream: which stream of the sampler's seed to draw from.

    Returns:
        An `Evaluation`.

    Raises:
        ValueError: for an argument out of range.

    Reference:
        The protocol of Finn, Abbeel, Levine (2017), section 5.2.
    """
    steps = tuple(steps)
    if tasks < 2:
        raise ValueError(f"an interval needs at least 2 tasks; got tasks={tasks}.")
    if not steps or min(steps) < 0:
        raise ValueError(f"steps are numbers of inner steps >= 0, at least one of them; got {steps}.")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1); got {confidence}. 95 % is 0.95.")
    with_stream = getattr(sampler, "with_stream", None)
    source: Sampler = sampler if with_stream is None else with_stream(stream)
    like = next(learner.model.parameters())
    # Blocks of one meta-batch, dealt as to processes: which tasks are drawn does not depend on how many are computed
    # together. A number without a divisor of a fair size, such as a prime, is drawn whole and computed in parts.
    fair = (n for n in range(1, tasks + 1) if tasks % n == 0 and BLOCK // 4 <= tasks // n <= BLOCK)
    blocks = next(fair, 1)
    collected, metric = [], "loss"
    with _evaluation_mode(learner.model):
        drawn = (source.sample(0, tasks, rank=rank, world_size=blocks) for rank in range(blocks))
        parts = (b.part(start, start + BLOCK) for b in drawn for start in range(0, b.num_tasks, BLOCK))
        total = blocks * -(-tasks // blocks // BLOCK)
        for part in tqdm(parts, total=total, desc="evaluate", unit="block", leave=False, disable=None):
            batch = part.to(like.device, like.dtype)
            values: dict[int, Tensor] = {}
            for step, params in enumerate(learner.trajectory(batch.support_x, batch.support_y, steps=max(steps))):
                if step not in steps:
                    continue
                with torch.no_grad():
                    predictions = learner.predict(params, batch.query_x)
                    right = accuracy(predictions, batch.query_y)
                    metric = "loss" if right is None else "accuracy"
                    loss = torch.func.vmap(learner.loss_fn)
                    values[step] = loss(predictions, batch.query_y) if right is None else right
            collected.append(torch.stack([values[step] for step in steps]).double().cpu())
    all_values = torch.cat(collected, dim=1)
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    halfwidth = z * all_values.std(dim=1) / math.sqrt(tasks)
    return Evaluation(
        steps,
        tuple(all_values.mean(1).tolist()),
        tuple(halfwidth.tolist()),
        all_values,
        "accuracy" if metric == "accuracy" else "loss",
        confidence,
    )


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
