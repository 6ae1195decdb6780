"""The outer optimizers of a recipe: composite momentum, and any of torch.optim by name."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from metamom.common.checks import check_number
from metamom.common.did_you_mean import did_you_mean
from metamom.common.numbers import real, shown
from metamom.experiments.defaults import STEP_SIZES
from metamom.maml.learner import MAML
from metamom.optim import CompositeMomentum

FLAGS = ("lr", "weight_decay", "beta", "first_step", "normalize", "variant")  # they have flags of their own
# `train` differentiates no step, and captures none in a graph of a GPU
UNUSED = ("params", "differentiable", "capturable")
EXAMPLE = "wanted name=value,name=value, such as betas=0.9,0.99,eps=1e-6"


def optimizers() -> dict[str, type[Optimizer]]:
    """All by name: torch's in lower case, and ``momentum``."""
    kinds = [kind for kind in vars(torch.optim).values() if isinstance(kind, type) and issubclass(kind, Optimizer)]
    return {"momentum": CompositeMomentum, **{kind.__name__.lower(): kind for kind in kinds if kind is not Optimizer}}


def find_optimizer(name: str) -> type[Optimizer]:
    """The class of that name.

    Raises:
        ValueError: for a name that is not known.
    """
    known = optimizers()
    if name not in known:
        near = did_you_mean([name], known)
        raise ValueError(f"the optimizer must be one of {', '.join(known)}; got {shown(name)}{near or '.'}")
    return known[name]


def default_lr(name: str, lr: float) -> float:
    """The step size where none is given; ``lr`` is the one of composite momentum and SGD."""
    if name in ("momentum", "sgd"):
        return lr
    default = STEP_SIZES.get(name, _parameters(name)["lr"].default)  # the table lacks those of later versions of torch
    if not isinstance(default, (int, float)):
        raise ValueError(f"{name} has no step size by default: give one, with lr (--lr).")
    return float(default)


def checked_weight_decay(name: str, weight_decay: float | None) -> float | None:
    """Check a weight decay; ``None`` if it is the optimizer's default.

    Raises:
        TypeError: if it is not a number.
        ValueError: if it is out of range, or if the optimizer has none.
    """
    if weight_decay is None:
        return None
    check_number("weight_decay", weight_decay)
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay must be >= 0 and finite; got {weight_decay}.")
    parameter = _parameters(name).get("weight_decay")
    if parameter is None and weight_decay != 0:
        raise ValueError(f"{name} has no weight decay; got {weight_decay}. Leave it out, or take another optimizer.")
    return None if parameter is None or weight_decay == parameter.default else float(weight_decay)


def parse_arguments(name: str, text: str | None) -> dict[str, Any]:
    """Parse further arguments of an optimizer: ``betas=0.9,0.99,eps=1e-6``.

    Args:
        name: of the optimizer; the signature of its constructor says which names and types there are.
        text: the arguments; ``None`` for none.

    Raises:
        ValueError: for a name or a type that the optimizer does not take, saying what it does.
    """
    known = {each: parameter for each, parameter in _parameters(name).items() if each not in (*FLAGS, *UNUSED)}
    found: dict[str, Any] = {}
    for key, values in _split(text).items():
        if key in FLAGS and key in _parameters(name):
            raise ValueError(f"optimizer_args: {key} has a flag of its own, --{key.replace('_', '-')}.")
        if key not in known:
            near = did_you_mean([key], known)
            raise ValueError(
                f"optimizer_args: {name} has no {shown(key)}; its options are {', '.join(known)}{near or '.'}"
            )
        found[key] = _typed(f"optimizer_args: {key} of {name}", known[key], values)
    return found


def groups_of(learner: MAML, inner_lr_lr: float | None) -> Iterable[nn.Parameter] | list[dict[str, Any]]:
    """The parameters of an optimizer of a learner: all in one group, or learned inner step sizes in a second one.

    Adam moves each number by about its step size γ in each iteration. With γ = 0.001, an inner step size of 0.01 may
    be negative after a few, unless it has a smaller γ of its own.

    Args:
        learner: with learned inner step sizes, unless ``inner_lr_lr`` is ``None``.
        inner_lr_lr: γ of the inner step sizes; ``None`` for the optimizer's.
    """
    if inner_lr_lr is None:
        return learner.parameters()
    step_sizes = list(learner.step_sizes.parameters())
    ids = {id(p) for p in step_sizes}
    others = [p for p in learner.parameters() if id(p) not in ids]
    groups: list[dict[str, Any]] = [{"params": others}, {"params": step_sizes, "lr": inner_lr_lr}]
    return groups


def make_optimizer(
    name: str, params: Iterable[nn.Parameter] | list[dict[str, Any]], arguments: Mapping[str, Any]
) -> Optimizer:
    """Make an optimizer.

    Args:
        name: of its class.
        params: parameters, or groups of them.
        arguments: of its constructor.

    Raises:
        ValueError: with what its constructor says of the arguments.
    """
    kind = find_optimizer(name)
    try:
        return kind(params, **arguments)
    except (ValueError, TypeError, RuntimeError, AssertionError) as error:
        if kind is CompositeMomentum:
            raise
        why = (" ".join(str(error).split()) or type(error).__name__).removesuffix(".")
        raise ValueError(f"the optimizer {name} refuses its options: {why}.") from error


def _parameters(name: str) -> Mapping[str, inspect.Parameter]:
    """Those of the constructor that have a name."""
    found = inspect.signature(find_optimizer(name)).parameters
    return {each: parameter for each, parameter in found.items() if parameter.kind is not parameter.VAR_KEYWORD}


def _split(text: str | None) -> dict[str, list[str]]:
    """The values of each name. What has no name belongs to the one before: ``betas=0.9,0.99``."""
    found: dict[str, list[str]] = {}
    last: list[str] | None = None
    for piece in [] if text is None else text.split(","):
        name, equals, value = piece.partition("=")
        if equals:
            name = name.strip(" ").replace("-", "_")
            if not name or name in found:
                raise ValueError(f"optimizer_args: {EXAMPLE}; got {shown(text or '')}.")
            last = found.setdefault(name, [])
        elif last is None:
            raise ValueError(f"optimizer_args: {EXAMPLE}; got {shown(text or '')}.")
        last.append((value if equals else piece).strip(" ()[]"))
    return found


def _typed(place: str, parameter: inspect.Parameter, texts: list[str]) -> Any:
    """The value of an argument, of the type that its default and annotation ask for."""
    default, annotation = parameter.default, str(parameter.annotation)
    values = [_literal(text) for text in texts]
    is_number = [isinstance(value, (int, float)) and not isinstance(value, bool) for value in values]
    if isinstance(default, tuple):
        wanted = f"{len(default)} numbers, such as {','.join(map(str, default)).lower()}"
        fits = len(values) == len(default) and all(
            number or (value is None and "None" in annotation) for value, number in zip(values, is_number, strict=True)
        )
        return _fitting(place, tuple(values), fits, wanted, texts)
    if isinstance(default, bool) or "bool" in annotation:
        fits = isinstance(values[0], bool) or (values[0] is None and default is None)
        wanted = "true or false"
    elif "str" in annotation:
        fits, wanted = isinstance(values[0], str) or values[0] is None, "a word"
    elif parameter.annotation in (int, "int"):
        fits, wanted = is_number[0] and values[0] == int(values[0]), "a whole number"
        values = [int(values[0])] if fits else values
    else:
        fits, wanted = is_number[0], "a number"
    return _fitting(place, values[0], fits and len(values) == 1, wanted, texts)


def _fitting(place: str, value: Any, fits: bool, wanted: str, texts: list[str]) -> Any:
    if not fits:
        raise ValueError(f"{place} should be {wanted}; got {shown(','.join(texts))}.")
    return value


def _literal(text: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return real(text)
    except ValueError:
        return text
