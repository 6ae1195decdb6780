"""Check a schedule's state in a checkpoint: the numbers it was created with, and its progress."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from metamom.bias import LambdaEta
from metamom.optim import LambdaBeta
from metamom.training.alike import check_alike, refuse, same, short
from metamom.training.optimizer_state import Moved, is_fixed

# the attributes that steps of LambdaBeta and torch's schedules change; all others stay as constructed
_COUNTED = {
    "last_epoch",
    "_step_count",
    "_last_lr",
    "_get_lr_called_within_step",
    "_is_initial",
    "T_cur",
    "T_i",
    "last_step",
}
COUNTED_AT_PLATEAUS = ("best", "num_bad_epochs", "cooldown_counter")  # by ReduceLROnPlateau, at each validation
_RATES = frozenset({"lr", "initial_lr"})
_MOMENTA = frozenset({"momentum", "betas"})


def moved_by(schedules: Iterable[Any]) -> Moved:
    """The optimizer options that these schedules may change."""
    moved = Moved()
    for schedule in schedules:
        if isinstance(schedule, LambdaBeta):
            moved = moved._replace(names=moved.names | {"beta"})
        elif isinstance(schedule, LambdaEta):
            continue  # the operator's own
        elif not _is_torchs(schedule):
            return Moved(moved.names | _RATES | _MOMENTA, others=True)
        else:
            inner = moved_by(getattr(schedule, "_schedulers", ()))
            cycles = type(schedule).__name__ in ("OneCycleLR", "CyclicLR")
            names = moved.names | inner.names | _RATES | (_MOMENTA if cycles else frozenset())
            moved = Moved(names, moved.others or inner.others)
    return moved


def check_schedule(schedule: LRScheduler | LambdaBeta | LambdaEta, state: Any, *, step: int) -> None:
    """Refuse a state that the schedule cannot have had after ``step`` steps.

    Raises:
        ValueError: naming the entry.
    """
    mine = schedule.state_dict()
    check_alike(mine, state, "its state")
    odd = [n for n in state if n not in mine and (not isinstance(n, str) or n == "optimizer" or hasattr(schedule, n))]
    if odd:  # torch would replace methods by them
        raise ValueError(f"its state holds {', '.join(map(str, odd))}, which {type(schedule).__name__} does not save")
    if isinstance(schedule, (LambdaBeta, LambdaEta)):
        _check_count("its state.last_step", state["last_step"], step)
        _check_made(mine, state, "its state", step)
    elif isinstance(schedule, ReduceLROnPlateau):  # it counts validations, and not steps
        _check_made({name: mine[name] for name in mine if name not in COUNTED_AT_PLATEAUS}, state, "its state", 0)
        for name in ("num_bad_epochs", "cooldown_counter"):
            _check_count(f"its state.{name}", state[name], 0)
        if state["best"] != state["best"]:
            refuse("its state.best", "a number", state["best"])
    elif _is_torchs(schedule):
        _check_made(mine, state, "its state", step)
    elif "last_epoch" in mine:
        _check_count("its state.last_epoch", state["last_epoch"], 0)


def check_rates(optimizer: Optimizer, schedules: Iterable[Any]) -> None:
    """Refuse step sizes other than those that the last of torch's schedules has set, if nothing else changes them.

    Args:
        optimizer: with the saved state.
        schedules: with the saved states, in the order of their steps; at least one step was done.

    Raises:
        ValueError: naming the step size.
    """
    schedules = list(schedules)
    rates = [schedule for schedule in schedules if isinstance(schedule, LRScheduler)]
    if not rates or not is_fixed(optimizer) or moved_by(schedules).others:
        return
    if len(rates) > 1 and any(isinstance(schedule, ReduceLROnPlateau) for schedule in rates):
        return  # the last that has set them may be any of them
    for i, (group, left) in enumerate(zip(optimizer.param_groups, rates[-1].get_last_lr(), strict=True)):
        if float(group["lr"]) != float(left):
            refuse(f"param_groups[{i}].lr", f"{float(left)!r}, as {type(rates[-1]).__name__} set it", group["lr"])


def _is_torchs(schedule: Any) -> bool:
    return isinstance(schedule, LRScheduler) and type(schedule).__module__ == "torch.optim.lr_scheduler"


def _check_made(mine: dict[str, Any], saved: dict[str, Any], place: str, least: int) -> None:
    """Refuse changed values, except for counters of steps, and counters below ``least``."""
    for name in (name for name in mine if name in saved):
        here, there, where = mine[name], saved[name], f"{place}.{name}"
        if name == "last_epoch":
            _check_count(where, there, least)
        elif name == "_schedulers":  # sequential (some have not started) or, without an outer counter, simultaneous
            for i, (inner, kept) in enumerate(zip(here, there, strict=True)):
                _check_made(inner, kept, f"{where}[{i}]", -1 if "last_epoch" in mine else least)
        elif name in ("T_cur", "T_i"):
            if there < (0 if name == "T_cur" else mine["T_0"]):
                refuse(where, f"a number >= {0 if name == 'T_cur' else mine['T_0']}", there)
        elif name not in _COUNTED and name != "lr_lambdas" and _is_data(here) and not same(here, there):
            refuse(where, f"{short(here) if not isinstance(here, list) else here}, as in this schedule", there)


def _is_data(value: Any) -> bool:
    """Whether a value can be compared: objects that hold functions cannot."""
    if isinstance(value, (list, tuple)):
        return all(map(_is_data, value))
    if isinstance(value, dict):
        return all(map(_is_data, value.values()))
    return value is None or isinstance(value, (bool, int, float, str))


def _check_count(place: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or value != int(value) or value < least:
        refuse(place, f"a whole number >= {least}" + (", the steps done" if least > 0 else ""), value)
