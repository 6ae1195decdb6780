"""What a checkpoint may hold of a schedule: the numbers that it was made with, and how far it has come."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from metamom.optim import LambdaBeta
from metamom.training.alike import check_alike, refuse, same, short
from metamom.training.optimizer_state import Moved, is_fixed

# what the steps of LambdaBeta and torch's own schedules change; all else is as they were made
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
_RATES = frozenset({"lr", "initial_lr"})
_MOMENTA = frozenset({"momentum", "betas"})


def moved_by(schedules: Iterable[Any]) -> Moved:
    """The options of an optimizer that these schedules may move."""
    moved = Moved()
    for schedule in schedules:
        if isinstance(schedule, LambdaBeta):
            moved = moved._replace(names=moved.names | {"beta"})
        elif not _is_torchs(schedule):
            return Moved(moved.names | _RATES | _MOMENTA, others=True)
        else:
            inner = moved_by(getattr(schedule, "_schedulers", ()))
            cycles = type(schedule).__name__ in ("OneCycleLR", "CyclicLR")
            names = moved.names | inner.names | _RATES | (_MOMENTA if cycles else frozenset())
            moved = Moved(names, moved.others or inner.others)
    return moved


def check_schedule(schedule: LRScheduler | LambdaBeta, state: Any, *, step: int) -> None:
    """Refuse a state that the schedule cannot have had after so many steps.

    Raises:
        ValueError: naming the entry.
    """
    mine = schedule.state_dict()
    check_alike(mine, state, "its state")
    odd = [n for n in state if n not in mine and (not isinstance(n, str) or n == "optimizer" or hasattr(schedule, n))]
    if odd:  # torch's would put them in place of its methods
        raise ValueError(f"its state holds {', '.join(map(str, odd))}, which no {type(schedule).__name__} saves")
    if isinstance(schedule, LambdaBeta):
        _check_count("its state.last_step", state["last_step"], step)
        _check_made(mine, state, "its state", step)
    elif _is_torchs(schedule):
        _check_made(mine, state, "its state", step)
    elif "last_epoch" in mine:
        _check_count("its state.last_epoch", state["last_epoch"], 0)


def check_rates(optimizer: Optimizer, schedules: Iterable[Any]) -> None:
    """Refuse step sizes other than the last of torch's schedules has left, where nothing else moves them.

    Args:
        optimizer: with the state that was saved.
        schedules: the same, in the order of their steps, of which at least one was done.

    Raises:
        ValueError: naming the step size.
    """
    schedules = list(schedules)
    rates = [schedule for schedule in schedules if isinstance(schedule, LRScheduler)]
    if not rates or not is_fixed(optimizer) or moved_by(schedules).others:
        return
    for i, (group, left) in enumerate(zip(optimizer.param_groups, rates[-1].get_last_lr(), strict=True)):
        if float(group["lr"]) != float(left):
            refuse(f"param_groups[{i}].lr", f"{float(left)!r}, which {type(rates[-1]).__name__} left", group["lr"])


def _is_torchs(schedule: Any) -> bool:
    return isinstance(schedule, LRScheduler) and type(schedule).__module__ == "torch.optim.lr_scheduler"


def _check_made(mine: dict[str, Any], saved: dict[str, Any], place: str, least: int) -> None:
    """Refuse another value of anything but what the steps count, and a count below the least."""
    for name in (name for name in mine if name in saved):
        here, there, where = mine[name], saved[name], f"{place}.{name}"
        if name == "last_epoch":
            _check_count(where, there, least)
        elif (
            name == "_schedulers"
        ):  # in turn, so that some have not begun, or (without a count around them) all at once
            for i, (inner, kept) in enumerate(zip(here, there, strict=True)):
                _check_made(inner, kept, f"{where}[{i}]", -1 if "last_epoch" in mine else least)
        elif name in ("T_cur", "T_i"):
            if there < (0 if name == "T_cur" else mine["T_0"]):
                refuse(where, f"a number >= {0 if name == 'T_cur' else mine['T_0']}", there)
        elif name not in _COUNTED and name != "lr_lambdas" and _is_data(here) and not same(here, there):
            refuse(where, f"{short(here) if not isinstance(here, list) else here}, as the schedule is made", there)


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
