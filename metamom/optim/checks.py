"""Checks of an optimizer's parameters, options and gradients."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from metamom.common.averaged import averaged_by
from metamom.common.checks import check_number, is_word
from metamom.common.choices import FOLLOWING, VARIANTS
from metamom.common.kinds import named_type

# Option names of other optimizers, and what to use instead.
INSTEAD = {
    "momentum": "a momentum of 0.9 elsewhere is beta=0.1 here, the weight of the new gradient",
    "dampening": 'first_step="gradient" is SGD with dampening = momentum, first_step="zero" the form of the analysis',
    "betas": "betas=(0.9, ...) is beta=0.1 here, the weight of the new gradient, and there is no second moment",
    "eps": "there is no second moment to keep away from zero; leave it out",
    "amsgrad": "there is no second moment; leave it out",
    "capturable": "as in SGD, a step keeps no counter that a CUDA graph would have to capture; leave it out. Under "
    "torch.compile, a step is not compiled again for another lr or beta if these are tensors",
    "learning_rate": "the step size is lr",
    "gamma": "the step size is lr",
    "alpha": "the step size is lr, and the weight of the new gradient beta",
}


def as_parameters(params: Any) -> list[Any]:
    """Parameters, pairs of names and parameters, or groups, as a list.

    Raises:
        TypeError: for anything else.
        ValueError: for none.
    """
    if isinstance(params, (torch.nn.Module, Tensor, str, Mapping)) or not isinstance(params, Iterable):
        raise TypeError(f"wanted parameters, such as model.parameters(); got {params!r:.80}.")
    found = list(params)
    if not found:
        raise ValueError("wanted parameters, such as model.parameters(); got none.")
    for each in found:
        if not isinstance(each, (Tensor, dict, tuple)):
            raise TypeError(f"wanted parameters, such as model.parameters(); got {named_type(each)} among them.")
    return found


def check_names(options: Mapping[str, Any], *, strict: bool) -> None:
    """Refuse other optimizers' options; if strict, all unknown ones. Groups may hold keys of schedulers or users."""
    for name, value in options.items():
        if name in INSTEAD:
            advice = INSTEAD[name]
            if name == "momentum" and isinstance(value, (int, float)) and 0 <= value < 1:
                advice = f"momentum={value} is beta={1 - value:.12g} here"
            raise TypeError(f"CompositeMomentum has no option {name!r}: {advice}.")
        if strict:
            raise TypeError(
                f"CompositeMomentum has no option {name!r}; its options are lr, beta, first_step, weight_decay, "
                "decoupled_weight_decay, nesterov, normalize, variant, maximize, foreach, fused and differentiable."
            )


def check_options(options: dict[str, Any]) -> None:
    lr = options["lr"]
    for name in ("lr", "beta", "weight_decay"):
        if not isinstance(options[name], Tensor):
            check_number(name, options[name])
        elif options[name].numel() != 1:
            shape = tuple(options[name].shape)
            raise ValueError(f"{name} must be a number or a tensor with one element; got shape {shape}.")
    if not 0 <= lr < math.inf:
        raise ValueError(f"lr is the step size and must be >= 0 and finite; got {lr}.")
    check_beta(options["beta"])
    if not is_word(options["first_step"], ("zero", "gradient")):
        raise ValueError(f'first_step must be "zero" or "gradient"; got {options["first_step"]!r}.')
    if not 0 <= options["weight_decay"] < math.inf:
        raise ValueError(f"weight_decay must be >= 0 and finite; got {options['weight_decay']}.")
    if options.get("fused"):
        for other in ("foreach", "differentiable", "normalize", "nesterov"):
            if options.get(other):
                raise ValueError(f"fused=True has no kernel with {other}=True. Leave one of the two out.")
    if options.get("differentiable") and options.get("foreach"):
        raise ValueError("differentiable=True updates the tensors one by one: leave foreach=True out.")
    variant = options.get("variant")
    if not (variant is None or is_word(variant, VARIANTS)):
        raise ValueError(f"variant must be one of {', '.join(map(repr, VARIANTS))}, or None; got {variant!r}.")
    for other in ("fused", "differentiable", "nesterov"):
        if variant in FOLLOWING and options.get(other):
            raise ValueError(f"variant={variant!r} has no form with {other}=True. Leave one of the two out.")


def check_state(state: Mapping[str, Any]) -> None:
    """Check what an optimizer is to continue from, before anything changes.

    Args:
        state: with the groups of parameters, and the state of each parameter.

    Raises:
        ValueError: for a group that lacks options, options out of range, or a momentum that is not a tensor.
    """
    for number, group in enumerate(state["param_groups"]):
        if missing := {"lr", "beta", "first_step", "weight_decay"} - set(group):
            raise ValueError(
                f"the state of CompositeMomentum lacks {', '.join(sorted(missing))} in a parameter group. Only states "
                "of CompositeMomentum and torch.optim.SGD can be continued; start without another optimizer's."
            )
        check_options(group)
        for index, p in enumerate(group["params"]):
            each = state["state"].get(p)
            if isinstance(each, Mapping) and not isinstance(each.get("momentum", p), Tensor):
                # what torch.distributed.checkpoint makes of a flattened state that has no entry for a parameter
                raise ValueError(
                    f"the state has no momentum for parameter {index} of group {number}, of shape {tuple(p.shape)}; "
                    f"got {each['momentum']!r:.40}. Was it frozen, or not there, when the state was saved? Leave its "
                    'entry out of state["state"], or, with torch.distributed.checkpoint, load a state that is not '
                    "flattened with strict=False: it starts with no momentum then."
                )
            if group.get("variant") in FOLLOWING and isinstance(each, Mapping):
                _check_previous(each, p, f"parameter {index} of group {number}", group["variant"])


def _check_previous(state: Mapping[str, Any], p: Tensor, which: str, variant: str) -> None:
    previous = state.get("previous")
    if "momentum" in state and not (isinstance(previous, Tensor) and previous.shape == p.shape):
        raise ValueError(
            f"variant={variant!r} keeps the weights of the last step, and the state has no 'previous' of shape "
            f"{tuple(p.shape)} for {which}. Load a state of the same variant, or start without one."
        )


def check_beta(beta: Any) -> Any:
    if isinstance(beta, Tensor) and torch.compiler.is_compiling():
        return beta  # its value is not known while torch.compile traces
    if not 0 < beta <= 1:
        raise ValueError(
            f"beta is the weight of the new gradient and must be in (0, 1]; got {beta}. "
            "A momentum of 0.9 elsewhere is beta=0.1 here; plain SGD is beta=1."
        )
    return beta


def check_gradients(params: list[Tensor], grads: list[Tensor]) -> None:
    for p, g in zip(params, grads, strict=True):
        if g.layout is not torch.strided:
            raise TypeError(
                f"CompositeMomentum needs dense gradients; got one with layout {g.layout} for a parameter of shape "
                f"{tuple(p.shape)}. Its average would be dense after one step: use sparse=False in the embedding."
            )


def check_not_averaged(params: list[Tensor], beta: float) -> None:
    """Refuse to average gradients that the workers have averaged (`metamom.server.aggregate.deliver` notes these)."""
    spec = averaged_by(params)
    if spec is not None:
        raise ValueError(
            f"{spec} carries the momentum on the workers, so the server must have none: use "
            f"CompositeMomentum(beta=1), and no schedule of beta; got beta={beta}."
        )
