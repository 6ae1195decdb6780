"""Check an optimizer's state in a checkpoint: its options, and the state of each parameter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from metamom.common.choices import FOLLOWING
from metamom.optim import CompositeMomentum
from metamom.training.alike import check_alike, check_kind, is_number, refuse, same, short

_EXACT = 2**24  # a step counter in float32 stops here
_LARGEST = 2**63  # torch does not accept larger whole numbers

Group = Mapping[str, Any]


def _of_adam(group: Group) -> set[str]:
    return {"step", "exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else [])}


def _of_rmsprop(group: Group) -> set[str]:
    buffers = [*(["momentum_buffer"] if group["momentum"] else []), *(["grad_avg"] if group["centered"] else [])]
    return {"step", "square_avg", *buffers}


# the state that these keep for each parameter, by its group's options: tensors of its shape, and a number "step"
_KEPT: dict[type[Optimizer], Callable[[Group], set[str]]] = {
    CompositeMomentum: lambda group: {"momentum", *(["previous"] if group["variant"] in FOLLOWING else [])},
    SGD: lambda group: {"momentum_buffer"} if group["momentum"] else set(),
    Adam: _of_adam,
    AdamW: _of_adam,
    RMSprop: _of_rmsprop,
}
_SQUARES = ("exp_avg_sq", "max_exp_avg_sq", "square_avg")


class Moved(NamedTuple):
    """The options that schedules change.

    Attributes:
        names: of the options.
        others: whether any other number may change too, because of a schedule of unknown type.
    """

    names: frozenset[str] = frozenset()
    others: bool = False

    def may_move(self, name: str, value: Any) -> bool:
        """Whether the option may differ from its value at construction."""
        numbers = value if isinstance(value, (list, tuple)) else [value]
        return name in self.names or (self.others and all(is_number(number) for number in numbers))


def is_fixed(optimizer: Optimizer) -> bool:
    """Whether the optimizer does not change its groups' options itself, as is true of ours and torch's own."""
    return type(optimizer) is CompositeMomentum or f"{type(optimizer).__module__}.".startswith("torch.optim.")


def check_optimizer(
    optimizer: Optimizer, state: Any, *, step: int, moved: Moved, idle: frozenset[int] = frozenset()
) -> None:
    """Refuse a state that the optimizer cannot have had.

    Args:
        optimizer: the optimizer to load it into.
        state: as saved.
        step: number of steps of the run.
        moved: options that schedules may have changed; all others must have their values at construction.
        idle: the ids of parameters that never get a gradient.

    Raises:
        ValueError: naming the entry.
    """
    mine = optimizer.state_dict()
    if not isinstance(state, dict) or set(state) != {"state", "param_groups"}:
        raise ValueError(f"its state should be a dict of 'state' and 'param_groups'; got {short(state)}")
    if not isinstance(state["state"], dict) or not isinstance(state["param_groups"], list):
        raise ValueError("'state' should be a dict and 'param_groups' a list")
    if len(state["param_groups"]) != len(mine["param_groups"]):
        raise ValueError(f"wanted {len(mine['param_groups'])} param_groups; got {len(state['param_groups'])}")
    for i, (here, there) in enumerate(zip(mine["param_groups"], state["param_groups"], strict=True)):
        _check_group(here, there, f"param_groups[{i}]", moved if is_fixed(optimizer) else Moved(frozenset(there), True))
    _check_numbers(mine["param_groups"], state["param_groups"])
    groups = {n: group for group in mine["param_groups"] for n in group["params"]}
    parameters = {
        n: p
        for group, numbered in zip(optimizer.param_groups, mine["param_groups"], strict=True)
        for n, p in zip(numbered["params"], group["params"], strict=True)
    }
    wanted = _KEPT.get(type(optimizer))
    for number, kept in state["state"].items():
        if type(number) is not int or number not in parameters:
            raise ValueError(f"'state' has an entry {short(number)}, which belongs to no parameter")
        if not isinstance(kept, dict):
            raise ValueError(f"state[{number}] should be a dict; got {short(kept)}")
        if wanted is not None:
            _check_kept(kept, wanted(groups[number]), parameters[number], f"state[{number}]", step)
        elif is_fixed(optimizer):
            _check_others(kept, f"state[{number}]", step)
    if step and is_fixed(optimizer):
        names = wanted or (lambda group: {"a state"})
        trained = {n: p for n, p in parameters.items() if p.requires_grad and id(p) not in idle}
        _check_complete(state["state"], {n: names(groups[n]) for n in trained})


def check_loaded(before: Group, after: Group, *, moved: Moved) -> None:
    """Refuse options that loading has filled in with new values, because an earlier version did not save them.

    Args:
        before: the optimizer's state before it was loaded.
        after: its state now.
        moved: see `check_optimizer`.

    Raises:
        ValueError: naming the option.
    """
    for i, (here, there) in enumerate(zip(before["param_groups"], after["param_groups"], strict=True)):
        for name, value in here.items():
            if not same(value, there.get(name)) and not moved.may_move(name, value):
                refuse(f"param_groups[{i}].{name}", f"{_described(value)}, as in this optimizer", there.get(name))


def _check_group(here: dict[str, Any], there: Any, place: str, moved: Moved) -> None:
    """Refuse options of the wrong type, or with values that nothing can have changed them to."""
    if not isinstance(there, dict) or not isinstance(there.get("params"), list):
        raise ValueError(f"{place} should be a dict with a list 'params'; got {short(there)}")
    if len(there["params"]) != len(here["params"]):
        raise ValueError(f"{place} should have {len(here['params'])} parameters; got {len(there['params'])}")
    check_alike({k: v for k, v in here.items() if k != "params"}, there, place)
    if there["lr"] < 0:
        refuse(f"{place}.lr", "a number >= 0", there["lr"])
    for name in (name for name in here if name in there and name != "params"):
        value = there[name]
        if not moved.may_move(name, here[name]):
            if not same(here[name], value):
                why = "since no schedule changes it" if is_number(here[name]) else "as in this optimizer"
                refuse(f"{place}.{name}", f"{_described(here[name])}, {why}", value)
        elif is_number(value) and not isinstance(value, Tensor) and abs(value) >= _LARGEST:
            refuse(f"{place}.{name}", "a number below 2^63", value)


def _check_numbers(mine: list[dict[str, Any]], saved: list[dict[str, Any]]) -> None:
    """Refuse parameter indices other than those that every optimizer assigns."""
    numbers = [n for group in saved for n in group["params"]]
    if not all(type(n) is int for n in numbers) or len(set(numbers)) < len(numbers):
        raise ValueError("'params' should be whole numbers that differ")
    for i, (here, there) in enumerate(zip(mine, saved, strict=True)):
        if here["params"] != there["params"]:
            raise ValueError(f"param_groups[{i}].params should number the parameters in order; got another order")


def _check_complete(state: Mapping[int, Any], wanted: Mapping[int, set[str]]) -> None:
    """Refuse a state without all trained parameters; `backward` gives a gradient even to unused ones."""
    missing = [number for number, names in wanted.items() if names and number not in state]
    if not missing:
        return
    names = ", ".join(sorted(wanted[missing[0]]))
    if not state:
        raise ValueError(f"'state' is empty, but after the first step it has {names} of each parameter")
    raise ValueError(f"'state' has no entry {missing[0]}, but after the first step there is {names} of each parameter")


def _check_kept(kept: dict[str, Any], wanted: set[str], parameter: Tensor, place: str, step: int) -> None:
    """Check the state that an elementwise optimizer keeps for a parameter."""
    if missing := sorted(wanted - set(kept)):
        raise ValueError(f"{place} has no {', '.join(missing)}")
    for name, value in kept.items():
        if name == "step":
            _check_step(value, f"{place}.{name}", step)
        elif value is not None or name in wanted:
            if not isinstance(value, Tensor) or value.shape != parameter.shape:
                refuse(f"{place}.{name}", f"a tensor of shape {tuple(parameter.shape)}", value)
            check_kind(parameter, value, f"{place}.{name}")
            squares = name in _SQUARES  # squares may overflow; the parameter then does not move
            if bool(value.isnan().any()) or not (squares or bool(value.isfinite().all())):
                raise ValueError(f"{place}.{name} is not finite in all of its entries")
            if squares and bool((value < 0).any()):
                raise ValueError(f"{place}.{name} holds an entry below zero, but it is a mean of squares")


def _check_others(kept: dict[str, Any], place: str, step: int) -> None:
    """Check the state that another torch optimizer keeps for a parameter: numbers and tensors, all present."""
    for name, value in kept.items():
        if name == "step":
            _check_step(value, f"{place}.{name}", step)
        elif not isinstance(value, Tensor) and not is_number(value):
            refuse(f"{place}.{name}", "a tensor or a number", value)
        elif bool((value != value) if is_number(value) else value.isnan().any()):
            raise ValueError(f"{place}.{name} is not finite in all of its entries")


def _check_step(value: Any, place: str, step: int) -> None:
    """Refuse a parameter with fewer steps than the run, since each step updates all parameters."""
    check_alike(0, value, place)
    if value < min(step, _EXACT) or value != int(value):
        refuse(place, f"a whole number >= {step}, the steps done", _number(value))


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value


def _described(value: Any) -> str:
    """An option's value for an error: numbers as Python's own."""
    if is_number(value):
        return repr(float(value))
    return repr(value) if isinstance(value, (list, tuple)) else short(value)
