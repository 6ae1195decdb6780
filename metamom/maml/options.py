"""The options of a learner: their ranges, and which of them can be set after construction."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from metamom.common.checks import INNER_STEPS, check_whole, is_word
from metamom.common.kinds import named_type
from metamom.maml.annealing import check_annealing
from metamom.maml.checks.hooks import check_hooks
from metamom.maml.checks.model_checks import check_kind
from metamom.maml.estimators import check_estimator, tracked_estimators
from metamom.maml.implicit.proximal import check_proximal
from metamom.maml.inner_optimizer import check_inner_optimizer
from metamom.maml.normalisation.norm import check_norm, resolved
from metamom.maml.normalisation.step_norms import check_step_norms
from metamom.maml.running.swapping import named
from metamom.maml.running.vectorize import VECTORIZE
from metamom.maml.tracking import check_tracking

# Options used only by the constructor: setting one later would have no effect, or leave the learner inconsistent.
BUILT_IN = (
    "adapt",
    "learn_inner_lr",
    "positive_inner_lr",
    "tracking",
    "compile",
    "multi_step",
    "first_order_until",
    "step_norms",
    "inner_optimizer",
)


def check_option(name: str, value: Any) -> None:
    """Refuse a value out of range for an option that can be set at any time. Other names are accepted.

    Raises:
        TypeError: for a value of the wrong kind.
        ValueError: for one out of range.
        AttributeError: for an option that only the constructor takes.
    """
    if name in BUILT_IN:
        raise AttributeError(
            f"{name} is fixed when a learner is made; got {name}={value!r} afterwards. Make another learner around "
            f"the same model: MAML(learner.model, learner.loss_fn, {name}=...)."
        )
    if name == "inner_steps":
        check_whole("inner_steps", value, 1, INNER_STEPS)
    elif name == "chunk_size":
        counted = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        if not (counted or value is None or (isinstance(value, str) and value == "auto")):
            raise ValueError(
                f'chunk_size must be a number of tasks >= 1, "auto", or None for all at once; got {value!r}.'
            )
    elif name == "vectorize":
        if not is_word(value, VECTORIZE):
            raise ValueError(f'vectorize must be "auto", "vmap" or "loop"; got {value!r}.')
    elif name == "autocast":
        if value not in (None, torch.bfloat16):
            raise ValueError(f"autocast must be torch.bfloat16 or None; got {value!r}.")
    elif name == "norm":
        check_norm(value)
    elif name == "loss_fn" and (not callable(value) or isinstance(value, type)):
        raise TypeError(
            "loss_fn must be a function (predictions, targets) -> loss, such as torch.nn.functional.mse_loss, or a "
            f"loss module such as nn.MSELoss(); got {value!r}."
        )


def check_loss_owner(loss_fn: Any) -> None:
    """Refuse a loss that hides a module with parameters, which would not get gradients.

    Raises:
        ValueError: with what to pass instead.
    """
    while isinstance(loss_fn, functools.partial):
        loss_fn = loss_fn.func
        if isinstance(loss_fn, nn.Module):
            break
    else:
        loss_fn = getattr(loss_fn, "__self__", None)
    if isinstance(loss_fn, nn.Module) and any(p.requires_grad for p in loss_fn.parameters()):
        raise ValueError(
            f"loss_fn calls {named_type(loss_fn)} with parameters, which would get no gradients: pass a module "
            "whose forward(predictions, targets) is the loss."
        )


def check_compile(compile: Any) -> None:
    """Refuse an unknown value of ``compile``.

    Raises:
        ValueError: with the known values.
    """
    if not (isinstance(compile, bool) or (isinstance(compile, str) and compile == "auto")):
        raise ValueError(f'compile must be True, False or "auto"; got {compile!r}.')


def check_replacement(before: nn.Module, after: nn.Module) -> None:
    """Refuse a model if its trainable parameters differ from those of the learner's first model.

    Raises:
        ValueError: naming those that differ.
    """
    wanted, found = (
        {name: tuple(p.shape) for name, p in named(model).items() if p.requires_grad} for model in (before, after)
    )
    if wanted != found:
        odd = sorted(name for name in {**wanted, **found} if wanted.get(name) != found.get(name))
        raise ValueError(
            "a learner's model can be replaced by one with the same trainable parameters; these differ: "
            f"{', '.join(odd)}. Make another learner around this model."
        )


def check_change(learner: Any, name: str, value: Any, tracking: float | None, learned: object) -> None:
    """Refuse a new value of an option that conflicts with the learner's other options.

    Args:
        learner: the learner, with its current options.
        name: of the attribute to set; names that are not options are accepted.
        value: its new value.
        tracking: b_u of the learner's memory, ``None`` if it has none.
        learned: which inner step sizes the learner learns.

    Raises:
        ValueError: with the conflict.
    """
    if name == "model":
        check_kind(value)
        resolved(value, learner.norm)
        if learner.vectorize == "vmap":
            check_hooks(value)
        check_replacement(learner.model, value)
    if name == "norm":
        resolved(learner.model, value)
    if name in ("estimator", "inner_batches", "inner_steps"):
        options = {each: getattr(learner, each) for each in ("estimator", "inner_batches", "inner_steps")}
        options[name] = value
        check_estimator(options["estimator"], options["inner_batches"])
        check_inner_optimizer(options["estimator"], learner.inner_optimizer)
        check_tracking(options["estimator"], tracking, options["inner_steps"], learned)
        if learner.norms_by_step is not None:
            check_step_norms(options["estimator"])
        if learner.annealing is not None:
            multi_step, first_order = learner.annealing.multi_step, learner.annealing.first_order
            check_annealing(
                options["estimator"], multi_step, 0 if options["estimator"] == "first-order" else first_order
            )
        learns = bool(learner.step_sizes.learned())
        check_proximal(options["estimator"], None, options["inner_steps"], learns, learner._gradients.compile is True)
        before = learner.estimator
        if name == "estimator" and value != before and {value, before} & set(tracked_estimators()):
            raise ValueError(
                f"a learner with estimator {before!r} cannot switch to {value!r}, which remembers other values for "
                "each task: make another learner around the same model."
            )
