"""Validate a run's arguments before it starts, and describe them as JSON."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from inspect import signature
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer, SparseAdam
from torch.optim.lr_scheduler import ReduceLROnPlateau

from metamom.batch import Sampler, TaskSampler, block, check_sampler, described
from metamom.bias import Bias, BiasOperator, Layout, as_operator
from metamom.bias.function import Function, function_name
from metamom.common.kinds import named_type
from metamom.distributed import World, as_world
from metamom.maml.learner import MAML
from metamom.maml.normalisation.norm import as_setting, resolved
from metamom.maml.steps.federation import Federation, check_estimator
from metamom.optim import CompositeMomentum
from metamom.server.aggregate import Aggregation
from metamom.server.down import as_down_bias
from metamom.server.participation import Participation
from metamom.server.robust import Aggregate, RobustMean
from metamom.training.contents import Contents
from metamom.training.options import Options
from metamom.training.schedule_state import COUNTED_AT_PLATEAUS
from metamom.training.schedulers import Scheduler as Scheduler
from metamom.training.schedulers import Schedulers as Schedulers
from metamom.training.schedulers import as_schedulers as as_schedulers


def check_plan(learner: MAML, sampler: Sampler, options: Options, world: World | None = None) -> Options:
    """Check arguments of `train` that would otherwise fail only after the run has started.

    Returns:
        The options, with NumPy's numbers converted to Python's, and objects for ``participation`` and ``down_bias``.

    Raises:
        TypeError: for anything but a learner or a sampler, or for an option of the wrong type.
        ValueError: for an option out of range, or options in conflict.
    """
    if not isinstance(learner, MAML):
        raise TypeError(f"train takes a metamom.MAML learner; got {named_type(learner)}. Wrap the model in MAML.")
    check_sampler(sampler, "train needs a sampler, which")
    options = options.in_range()
    workers = options.workers
    families = sampler.workers if isinstance(sampler, TaskSampler) else None
    if families not in (None, workers):
        raise ValueError(
            f"the sampler has a family for each of {families} workers: pass workers={families}; got {workers}."
        )
    if world is not None:
        block(options.meta_batch, world.rank, world.size)
    sizes = Layout(p.shape for p in learner.meta_parameters().values())
    # checks that they fit together
    plan = federation(options, options.local_lr)
    check_estimator(learner.estimator, options.local_steps)
    plan.check(options.meta_batch, workers, as_world(world))
    part: dict[str, Any] = {"present": plan.present(workers), "worker_weights": plan.worker_weights}
    robust = RobustMean(options.aggregate, options.attack)
    server = Aggregation(workers, options.bias, robust, sizes=sizes, world=world, **part)
    if plan.down is not None:
        plan.down.operator.wire_bytes(sum(sizes), sizes=sizes)
    if server.operator is not None:
        server.operator.wire_bytes(sum(sizes), sizes=sizes)  # raises an error if K is too large
    return replace(options, participation=plan.participation, down_bias=plan.down)


def federation(options: Options, local_lr: float | None = None) -> Federation:
    """The options of absent workers, weights, local steps and the message to the workers.

    Args:
        options: of the run.
        local_lr: the step size of local steps; any if ``None``.
    """
    share, down = options.participation, as_down_bias(options.down_bias)
    participation = share if share is None or isinstance(share, Participation) else Participation(share)
    several = options.local_steps > 1
    lr = (1.0 if local_lr is None else local_lr) if several else None
    return Federation(participation, options.worker_weights, options.local_steps, lr, down)


def step_size(optimizer: Optimizer) -> float:
    """The step size of all of an optimizer's groups.

    Raises:
        ValueError: if they differ.
    """
    sizes = [float(group["lr"]) for group in optimizer.param_groups]
    if len(set(sizes)) > 1:
        raise ValueError(
            f"local steps take the optimizer's step size, but its groups have {sizes}: pass local_lr (--local-lr)."
        )
    return sizes[0]


def check_momentum(optimizer: Optimizer, operator: BiasOperator | None) -> None:
    """Refuse momentum on the server if the workers have it: averaging twice is a different method.

    Raises:
        ValueError: with what to set.
    """
    if operator is None or not operator.carries_momentum:
        return
    ours = isinstance(optimizer, CompositeMomentum)  # another optimizer may call something else beta
    for group in optimizer.param_groups:
        without = group["beta"] == 1 if ours else group.get("momentum", 0) == 0 and group.get("betas", (0,))[0] == 0
        if not without:
            raise ValueError(
                f"{operator.spec} carries the momentum on the workers, so the server must have none: use "
                f"CompositeMomentum(beta=1) (--beta 1), and no schedule of beta; got {type(optimizer).__name__} with "
                f"{ {k: group[k] for k in ('beta', 'momentum', 'betas') if k in group} }."
            )


def check_optimizer(learner: MAML, optimizer: object) -> None:
    """Refuse an optimizer that does not update the learner's parameters.

    Some of the model's parameters may be left out or frozen.

    Raises:
        TypeError: for anything but an optimizer, or one that needs more than one dense gradient a step.
        ValueError: if it has none of the learner's parameters, has others too, or lacks the learned step sizes.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"train takes a torch optimizer over learner.parameters(); got {named_type(optimizer)}.")
    if isinstance(optimizer, SparseAdam):
        raise TypeError("SparseAdam takes only sparse gradients, and meta-gradients are dense: use torch.optim.Adam.")
    if not _steps_alone(optimizer):
        raise TypeError(
            f"{type(optimizer).__name__}.step wants a closure, to compute the loss as often as it likes, but train "
            "computes one meta-gradient a step: use CompositeMomentum, torch.optim.SGD or torch.optim.Adam."
        )
    held = {id(p): p for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
    own = {id(p) for p in (*learner.parameters(), *learner.meta_parameters().values())}
    advice = "Make it over learner.parameters(), after the learner, and both again where the model is another one."
    if not own & set(held):
        raise ValueError(f"the optimizer holds none of the learner's parameters, so that nothing would move. {advice}")
    foreign = [p for key, p in held.items() if key not in own]
    if foreign:
        raise ValueError(
            f"{len(foreign)} of the optimizer's {len(held)} parameters are not the learner's and would never be "
            f"updated, the first of shape {tuple(foreign[0].shape)}. {advice}"
        )
    missing = [name for name, p in learner.step_sizes.learned().items() if p.requires_grad and id(p) not in held]
    if missing:
        raise ValueError(
            "the learner learns inner step sizes that the optimizer does not hold, so they would never be updated: "
            f"{', '.join(missing[:3])}{', ...' * (len(missing) > 3)}. Make it over learner.parameters(), which has the "
            "model's and learned ones (a plain tensor given as inner_lr must be added), or learn none."
        )


def _steps_alone(optimizer: Optimizer) -> bool:
    """Whether its method ``step`` can be called without a closure."""
    try:
        signature(type(optimizer).step).bind(optimizer)  # the class's method, since schedulers wrap the object's
    except TypeError:
        return False
    except ValueError:  # not written in Python, so it has no signature
        return True
    return True


# entries of `describe` that earlier versions did not record
LATER = ("loss", "dtype", "schedulers", "validation", "contents", "code", "normalisation", "data_sha256")


def describe(
    learner: MAML,
    optimizer: Optimizer,
    sampler: Sampler,
    *,
    meta_batch: int,
    workers: int,
    bias: Bias,
    aggregate: Aggregate = "mean",
    schedulers: Sequence[Any] = (),
    validation: Sampler | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Describe the settings that define a run, as JSON values. This is the default of ``train(settings=...)``.

    It leaves out how the run is computed (chunks, compilation, device), its length, and what is only measured. Further
    ``options`` are JSON values already.
    """
    groups = [
        # versions before the variants had no such entry
        {k: _plain(v) for k, v in group.items() if k != "params" and not (k == "variant" and v is None)}
        for group in optimizer.param_groups
    ]
    operator = as_operator(bias)
    like = next(learner.model.parameters())
    uses = as_setting(resolved(learner.model, None)) if learner.norm is None else None  # what the model's mode says
    loss, own = Contents(learner.loss_fn), Contents(*_functions(operator))
    contents = {"loss": loss.values[0], **({"bias": own.values} if own.values else {})}
    return {
        "model": str(learner.model),
        "loss": describe_loss(learner.loss_fn),
        "contents": json.loads(json.dumps(contents)),
        "code": [loss.code, own.code],
        "dtype": str(like.dtype),
        "autocast": None if learner.autocast is None else str(learner.autocast),
        "learner": learner.describe(),
        "optimizer": {"kind": type(optimizer).__name__, "groups": groups},
        "schedulers": [{"kind": type(each).__name__, **_of_schedule(each)} for each in schedulers],
        "sampler": described(sampler),
        "meta_batch": meta_batch,
        "workers": workers,
        "bias": "none" if operator is None else operator.spec,
        "aggregate": aggregate,
        **options,
        **({} if uses is None else {"normalisation": uses}),
        # validation determines the best checkpoint, so it is only recorded if there is one
        **({} if validation is None else {"validation": described(validation)}),
    }


def _of_schedule(schedule: Any) -> dict[str, Any]:
    """Describe a schedule: what it was made with, without its progress."""
    described = _numbers(schedule.state_dict())
    if isinstance(schedule, ReduceLROnPlateau):
        return {name: value for name, value in described.items() if name not in (*COUNTED_AT_PLATEAUS, "mode_worse")}
    return described


def describe_loss(function: Any) -> dict[str, Any]:
    """Describe a loss: its name, and the numbers and strings in a module or partial function."""
    if isinstance(function, nn.Module):
        return {"name": str(function), **_numbers(vars(function))}
    if isinstance(function, functools.partial):
        return {**describe_loss(function.func), **_numbers(function.keywords)}
    return {"name": function_name(function)}


def _functions(operator: BiasOperator | None) -> list[Any]:
    """The user functions in an operator."""
    if isinstance(operator, Function):
        return [operator.function]
    within = [] if operator is None else list(vars(operator).values())
    flat = [each for value in within for each in (value if isinstance(value, (list, tuple)) else [value])]
    return [function for each in flat if isinstance(each, BiasOperator) for function in _functions(each)]


def _numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a dict that JSON can hold, without private ones and step counters."""
    kept = {}
    for name, value in values.items():
        if not name.startswith("_") and name not in ("last_epoch", "last_step"):
            with contextlib.suppress(TypeError, ValueError):
                kept[name] = json.loads(json.dumps(value, default=_plain))
    return kept


def _plain(value: Any) -> Any:
    return float(value) if isinstance(value, Tensor) else value
