"""Why a loss or a meta-gradient is not finite, found after the fact: by the weights, or by adapting one task again."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from metamom.batch import TaskBatch
from metamom.bias import NonFiniteError
from metamom.bias.checks import all_finite
from metamom.common.diverged import DivergedError
from metamom.common.modules import named_buffers_of, named_parameters_of
from metamom.maml.inner_loop import trajectory
from metamom.maml.plan import Plan
from metamom.maml.predicting import losses, predictions
from metamom.maml.problem import Problem, start_of
from metamom.maml.task_weights import Params
from metamom.maml.under_vmap.draws import Step

SMALLER_LR = "Try a smaller lr, or clipped gradients (bias=Clip(1.0))."
AT_ZERO = "as that of a square root or a norm at 0 (add a small number inside it)"
UNCHANGED = ".grad is unchanged. check_finite=False returns such results instead."


class NonFiniteStepError(DivergedError, NonFiniteError):
    """The loss or the meta-gradient of a batch of finite data is not finite. The message says what is too large."""

    def __init__(self, message: str) -> None:
        Exception.__init__(self, message)
        self.step = None


def not_finite(plan: Plan, weights: Params, batch: TaskBatch, query_losses: Tensor, first: int) -> NonFiniteStepError:
    """The error for a step whose data is finite, but not its losses or its gradient.

    Args:
        plan: how the meta-gradient was computed.
        weights: the meta-parameters by name.
        batch: T tasks.
        query_losses: of these tasks, ``[T]``.
        first: the index of the first one in the batch of all processes.
    """
    return NonFiniteStepError(f"{_reason(plan, weights, batch, query_losses, first)} {UNCHANGED}")


def _reason(plan: Plan, weights: Params, batch: TaskBatch, query_losses: Tensor, first: int) -> str:
    broken = [name for name, w in weights.items() if not all_finite(w.detach())]
    if broken:
        return (
            f"the weights are not finite: {', '.join(broken)}. An earlier step was too large; start again from finite "
            f"weights. {SMALLER_LR}"
        )
    bad = (~query_losses.isfinite()).nonzero().flatten().tolist()
    if not bad:
        return (
            "the losses are finite, but the meta-gradient is not: it overflows, or the model or the loss has a "
            f"derivative that is not finite, {AT_ZERO}. {SMALLER_LR} A smaller inner_lr or "
            "float64 also keeps derivatives in range."
        )
    where = f"the query loss is not finite in {len(bad)} of {len(query_losses)} tasks, first in task {first + bad[0]}"
    return f"{where}{_of_task(plan, weights, batch.part(bad[0], bad[0] + 1))}"


def _not_trained(problem: Problem, weights: Params) -> list[str]:
    """The names of buffers and frozen parameters with NaN. Infinite ones are common, as in masks of attention."""
    found: list[str] = []
    for place, module in (("", problem.model), ("loss_fn.", problem.loss_fn)):
        tensors = {**named_parameters_of(module), **named_buffers_of(module)} if isinstance(module, nn.Module) else {}
        found += [place + name for name, x in tensors.items() if place + name not in weights and _has_nan(x)]
    return found


def _has_nan(x: Tensor) -> bool:
    return x.layout is torch.strided and bool(x.isnan().any())


def _of_task(plan: Plan, weights: Params, one: TaskBatch) -> str:
    """Why the query loss of a task is not finite: adapt to it again, step by step."""
    problem, term = plan.problem, plan.cut(one)[0]
    sets = [*(step.points() for step in term.steps), term.query()]
    step = Step()
    with torch.random.fork_rng(devices=[]), step.tasks(0, 1), torch.no_grad():
        start = start_of(problem, {name: w.detach().unsqueeze(0) for name, w in weights.items()}, term.copies)

        def loss(own: Params, number: int) -> float:
            x, y, mask = sets[number]
            there = start.at(number % len(sets))
            return float(losses(problem, there, own, predictions(problem, there, own, x, mask), y, mask).sum())

        before = loss(start.own, -1)
        for number, own in enumerate(trajectory(problem, start, term.steps, keep_graph=False)):
            if math.isfinite(loss(own, number)) and (number or math.isfinite(before)):
                continue
            if number == 0:
                break
            if any(w.isnan().any() for w in own.values()):
                return (
                    f": the gradient of inner step {number} is NaN although the loss there is finite. The model or the "
                    f"loss has a derivative that is not finite, {AT_ZERO}."
                )
            size = problem.step_sizes.values()
            of_size = f" of inner_lr={size:g}" if isinstance(size, float) else ""
            return (
                f": the inner steps are too large. Its loss is {before:.4g} before them, and not finite after "
                f"{number}{of_size}. Try a smaller inner_lr."
            )
    if kept := _not_trained(problem, weights):
        return (
            f", and not because of the inner steps: tensors that are not trained hold NaN: {', '.join(kept)}. Compute "
            "or load these buffers and frozen parameters again."
        )
    return (
        ", and not because of the inner steps: the weights have grown too large, or the loss is not finite for some "
        f"predictions (the logarithm of 0). {SMALLER_LR}"
    )
