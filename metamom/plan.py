"""What a training run is to do: told in JSON values, and refused where it cannot be done."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from metamom.batch import Sampler, block
from metamom.bias import Bias, BiasOperator, as_operator
from metamom.distributed import World
from metamom.maml import MAML
from metamom.robust import Aggregate, check_aggregate


def check_plan(
    learner: MAML,
    sampler: Sampler,
    *,
    iterations: int,
    meta_batch: int,
    workers: int,
    bias: Bias,
    aggregate: Aggregate,
    evaluate_every: int | None,
    evaluate_tasks: int,
    checkpoint_every: int = 1,
    world: World | None = None,
) -> None:
    """Refuse what `train` could only refuse after it had begun; the arguments are `train`'s.

    Raises:
        ValueError: for an argument out of range, or arguments that do not fit each other.
    """
    for name, value in (("iterations", iterations), ("meta_batch", meta_batch), ("checkpoint_every", checkpoint_every)):
        if value < 1:
            raise ValueError(f"{name} must be >= 1; got {value}.")
    if evaluate_every is not None and evaluate_every < 1:
        raise ValueError(f"evaluate_every must be >= 1, or None for the end alone; got {evaluate_every}.")
    if evaluate_tasks < 2:
        raise ValueError(f"a validation needs at least 2 tasks; got evaluate_tasks={evaluate_tasks}.")
    if workers < 1 or meta_batch % workers:
        raise ValueError(f"the number of workers must divide the meta-batch of {meta_batch} tasks; got {workers}.")
    families = getattr(sampler, "workers", workers)
    if families != workers:
        raise ValueError(
            f"the sampler has a family for each of {families} workers: pass workers={families}; got {workers}."
        )
    check_aggregate(aggregate, workers)
    if world is not None:
        world.workers(workers)
        block(meta_batch, world.rank, world.size)
    operator = as_operator(bias)
    if operator is not None:
        sizes = [p.numel() for p in learner.meta_parameters().values()]
        operator.wire_bytes(sum(sizes), sizes=sizes)  # an operator too large says so


def check_momentum(optimizer: Optimizer, operator: BiasOperator | None) -> None:
    """Refuse momentum on the server where the workers have it: averaged twice, it is another method.

    Raises:
        ValueError: saying what to set.
    """
    if operator is None or not operator.carries_momentum:
        return
    for group in optimizer.param_groups:
        if group.get("beta", 1) != 1 or group.get("momentum", 0) != 0 or "betas" in group:
            raise ValueError(
                f"{operator.spec} carries the momentum on the workers, so the server must have none: use "
                f"CompositeMomentum(beta=1) (--beta 1), and no schedule of beta; got {type(optimizer).__name__} with "
                f"{ {k: group[k] for k in ('beta', 'momentum', 'betas') if k in group} }."
            )


def describe(
    learner: MAML, optimizer: Optimizer, sampler: Sampler, *, meta_batch: int, workers: int, bias: Bias
) -> dict[str, Any]:
    """What defines a run made from these parts, as JSON values: the default of ``train(settings=...)``."""
    groups = [{k: _plain(v) for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    family = getattr(sampler, "describe", None)
    operator = as_operator(bias)
    return {
        "model": str(learner.model),
        "learner": learner.describe(),
        "optimizer": {"kind": type(optimizer).__name__, "groups": groups},
        "sampler": {"family": type(sampler).__name__} if family is None else family(),
        "meta_batch": meta_batch,
        "workers": workers,
        "bias": "none" if operator is None else operator.spec,
    }


def _plain(value: Any) -> Any:
    return float(value) if isinstance(value, Tensor) else value
