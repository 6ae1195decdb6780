"""A checkpoint's contents into the parts of a run: looked at first, then all of them or none.

Files are checked where they are read (`metamom.training.checkpoints`). Here it is whether what they hold fits: a part
is the schema of its own state.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from numbers import Real
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop
from torch.optim.lr_scheduler import LRScheduler

from metamom.bias import BiasOperator
from metamom.optim import CompositeMomentum, LambdaBeta
from metamom.training.checkpoints import CheckpointError

# what `load_state_dict` of modules, optimizers, schedulers and operators raises for states of another kind
_MISFITS = (
    RuntimeError, ValueError, TypeError, LookupError, AttributeError, OverflowError, AssertionError, MemoryError,
)  # fmt: skip
# what these must keep of each parameter: tensors of its shape, or one number as "step"
_KEPT: dict[type[Optimizer], set[str]] = {
    CompositeMomentum: {"momentum"},
    SGD: set(),
    Adam: {"step", "exp_avg", "exp_avg_sq"},
    AdamW: {"step", "exp_avg", "exp_avg_sq"},
    RMSprop: {"step", "square_avg"},
}


class Generators(NamedTuple):
    """States of torch's global generators, of the CPU and of each GPU."""

    cpu: Tensor
    cuda: list[Tensor]


def load_parts(
    parts: Mapping[str, Any],
    state: Mapping[str, Any],
    where: str,
    *,
    entries: int | None = None,
    step: int = 0,
    misfit: str = "are of another model or optimizer",
) -> None:
    """Load each part's state; where one does not fit, all are as they were before.

    Args:
        parts: by name; each has ``state_dict`` and ``load_state_dict``.
        state: by the same names.
        where: it comes from, for the error: "the checkpoints in RUN".
        entries: of the gradients that bias operators keep something of.
        step: steps that were done, after which an optimizer has a state.
        misfit: what is said of a state that does not fit.

    Raises:
        CheckpointError: naming the part, and what is wrong.
    """
    missing = [name for name in parts if name not in state]
    if missing:
        raise CheckpointError(f"there is no {', '.join(missing)} in {where}: another kind of run wrote it.")
    before = {name: copy.deepcopy(part.state_dict()) for name, part in parts.items()}
    name = ""
    try:
        for name, part in parts.items():
            if isinstance(part, Optimizer):
                scheduled = any(str(other).startswith("scheduler") for other in state)
                _check_optimizer(part, state[name], begun=step > 0, scheduled=scheduled)
            elif isinstance(part, (LRScheduler, LambdaBeta)):
                _check_schedule(part, state[name])
            elif not isinstance(state[name], Mapping):
                raise ValueError(f"its state should be a dict; got {type(state[name]).__name__}")
            elif isinstance(part, nn.Module):
                _check_weights(part, state[name])
            part.load_state_dict(state[name])
            if isinstance(part, BiasOperator) and entries is not None:
                _check_entries(part.state_dict(), entries, "its state")
    except _MISFITS as error:
        for part_name, part in parts.items():
            part.load_state_dict(before[part_name])
        why = " ".join(str(error).split())
        kind = "" if isinstance(error, (ValueError, RuntimeError)) else f"{type(error).__name__}: "
        raise CheckpointError(f"{where} {misfit}: {name}: {kind}{why}") from error


MOST = {"step": math.inf, "seconds": 2**53}  # what a float still tells apart


def checked_head(state: Mapping[str, Any], where: str) -> tuple[int, float]:
    """``"step"`` and ``"seconds"`` of a checkpoint.

    Raises:
        CheckpointError: for anything but a whole number and a number, >= 0.
    """
    for name, kinds in (("step", (int,)), ("seconds", (int, float))):
        value = state.get(name)
        if isinstance(value, bool) or not isinstance(value, kinds) or not 0 <= value < MOST[name]:
            kind = "a whole number" if kinds == (int,) else "a number"
            raise CheckpointError(f"{where} should hold {kind} >= 0 as {name!r}; got {_short(value)}.")
    return state["step"], float(state["seconds"])


def checked_generators(state: Any, where: str) -> Generators:
    """The states of torch's generators, each proved on a generator that nobody uses.

    Raises:
        CheckpointError: if they are none.
    """
    if not isinstance(state, Mapping) or not isinstance(state.get("cpu"), Tensor):
        raise CheckpointError(
            f"{where} should hold the states of torch's generators as 'rng', a dict with a tensor 'cpu' and a list "
            f"'cuda'; got {_short(state)}."
        )
    try:
        found = Generators(state["cpu"], list(state["cuda"]))
        torch.Generator().set_state(found.cpu)
        for number, each in enumerate(found.cuda):
            if not isinstance(each, Tensor) or each.dtype != torch.uint8:
                raise TypeError(f"the state of GPU {number} is no tensor of bytes")
            if torch.cuda.is_available():
                torch.Generator(device="cuda").set_state(each)
    except _MISFITS as error:
        why = " ".join(str(error).split())
        raise CheckpointError(
            f"{where} hold no states of generators in 'rng': {type(error).__name__}: {why}"
        ) from error
    return found


def _check_entries(state: dict[str, Any], entries: int, place: str) -> None:
    """Of what operators keep of workers' gradients, all is ``[d]``, or ``[n, d]``."""
    for name, value in state.items():
        if isinstance(value, dict):
            _check_entries(value, entries, f"{place}.{name}")
        elif isinstance(value, Tensor) and value.is_floating_point() and value.shape[-1:] != (entries,):
            _refuse(f"{place}.{name}", f"a tensor of {entries} entries", value)


def _check_weights(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Refuse weights that would be cast in silence from another kind of number, or that are not finite."""
    parameters = dict(module.named_parameters())
    for name, mine in module.state_dict().items():
        saved = state.get(name)
        if isinstance(mine, Tensor) and isinstance(saved, Tensor):
            _check_kind(mine, saved, name)
            if name in parameters and not bool(saved.isfinite().all()):
                raise ValueError(f"{name} is not finite in all of its entries, which no run saves")


def _check_kind(mine: Tensor, saved: Tensor, place: str) -> None:
    """Floating point, complex, whole numbers or truth values, all of them or none; widths may differ."""
    if _kind(mine) != _kind(saved):
        raise ValueError(f"{place} should be of {mine.dtype}; got a tensor of {saved.dtype}")


def _kind(tensor: Tensor) -> tuple[bool, bool, bool]:
    return tensor.is_floating_point(), tensor.is_complex(), tensor.dtype == torch.bool


def _check_optimizer(optimizer: Optimizer, state: Any, *, begun: bool, scheduled: bool) -> None:
    """Refuse a state that the optimizer cannot have had.

    Args:
        optimizer: that is to take it.
        state: as saved.
        begun: whether it has done a step.
        scheduled: whether schedules moved its step sizes, which are else those that it was made with.
    """
    mine = optimizer.state_dict()
    if not isinstance(state, dict) or set(state) != {"state", "param_groups"}:
        raise ValueError(f"its state should be a dict of 'state' and 'param_groups'; got {_short(state)}")
    if not isinstance(state["state"], dict) or not isinstance(state["param_groups"], list):
        raise ValueError("'state' should be a dict and 'param_groups' a list")
    if len(state["param_groups"]) != len(mine["param_groups"]):
        raise ValueError(f"wanted {len(mine['param_groups'])} param_groups; got {len(state['param_groups'])}")
    numbers: list[Any] = []
    for i, (here, there) in enumerate(zip(mine["param_groups"], state["param_groups"], strict=True)):
        if not isinstance(there, dict) or not isinstance(there.get("params"), list):
            raise ValueError(f"param_groups[{i}] should be a dict with a list 'params'; got {_short(there)}")
        if len(there["params"]) != len(here["params"]):
            raise ValueError(
                f"param_groups[{i}] should have {len(here['params'])} parameters; got {len(there['params'])}"
            )
        numbers += there["params"]
        _check_alike({k: v for k, v in here.items() if k != "params"}, there, f"param_groups[{i}]")
        lr = there["lr"]
        if lr < 0:
            _refuse(f"param_groups[{i}].lr", "a number >= 0", lr)
        if type(optimizer) in _KEPT and not scheduled and float(lr) != float(here["lr"]):
            _refuse(f"param_groups[{i}].lr", f"{float(here['lr'])!r}, for no schedule moved it", lr)
    if not all(type(number) is int for number in numbers) or len(set(numbers)) < len(numbers):
        raise ValueError("'params' should be whole numbers that differ")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if begun and _KEPT.get(type(optimizer)) and not state["state"]:
        wanted = ", ".join(sorted(_KEPT[type(optimizer)]))
        raise ValueError(f"'state' holds nothing, but after its first step there is {wanted} of each parameter")
    by_number = dict(zip(numbers, parameters, strict=True))
    for number, kept in state["state"].items():
        if type(number) is not int or number not in by_number:
            raise ValueError(f"'state' has an entry {_short(number)}, which is no parameter's")
        if not isinstance(kept, dict):
            raise ValueError(f"state[{number}] should be a dict; got {_short(kept)}")
        if type(optimizer) in _KEPT:
            _check_kept(kept, _KEPT[type(optimizer)], by_number[number], f"state[{number}]")


def _check_kept(kept: dict[str, Any], wanted: set[str], parameter: Tensor, place: str) -> None:
    """What an optimizer that works entry by entry keeps of a parameter."""
    if missing := sorted(wanted - set(kept)):
        raise ValueError(f"{place} has no {', '.join(missing)}")
    for name, value in kept.items():
        if name == "step":
            _check_alike(0, value, f"{place}.{name}")
        elif value is not None:
            if not isinstance(value, Tensor) or value.shape != parameter.shape:
                _refuse(f"{place}.{name}", f"a tensor of shape {tuple(parameter.shape)}", value)
            _check_kind(parameter, value, f"{place}.{name}")
            if bool(value.isnan().any()) or (name == "momentum" and not bool(value.isfinite().all())):
                raise ValueError(f"{place}.{name} is not finite in all of its entries")


def _check_schedule(schedule: LRScheduler | LambdaBeta, state: Any) -> None:
    mine = schedule.state_dict()
    _check_alike(mine, state, "its state")
    odd = [n for n in state if n not in mine and (not isinstance(n, str) or n == "optimizer" or hasattr(schedule, n))]
    if odd:  # torch's would put them in place of its methods
        raise ValueError(f"its state holds {', '.join(map(str, odd))}, which no {type(schedule).__name__} saves")


def _check_alike(mine: Any, saved: Any, place: str) -> None:
    """Refuse a saved value of another kind than the one that is here: type, shape, keys, length.

    What is unset here may be anything. Flags that were not there in an earlier version of torch may be missing.
    """
    if mine is None or (isinstance(mine, bool) and (saved is None or isinstance(saved, bool))):
        return
    if _is_number(mine):
        if not _is_number(saved) or (math.isfinite(mine) and not math.isfinite(saved)):
            _refuse(place, "a number", saved)
    elif isinstance(mine, Tensor):
        if not isinstance(saved, Tensor) or saved.shape != mine.shape:
            _refuse(place, f"a tensor of shape {tuple(mine.shape)}", saved)
    elif isinstance(mine, dict):
        if not isinstance(saved, dict):
            _refuse(place, "a dict", saved)
        missing = [key for key, value in mine.items() if key not in saved and not isinstance(value, (bool, type(None)))]
        if missing:
            raise ValueError(f"{place} has no {', '.join(map(str, missing))}")
        for key in mine.keys() & saved.keys():
            _check_alike(mine[key], saved[key], f"{place}.{key}")
    elif isinstance(mine, (list, tuple)):
        if not isinstance(saved, (list, tuple)) or len(saved) != len(mine):
            _refuse(place, f"{len(mine)} entries", saved)
        for i, (a, b) in enumerate(zip(mine, saved, strict=True)):
            _check_alike(a, b, f"{place}[{i}]")
    elif type(saved) is not type(mine):
        _refuse(place, f"a {type(mine).__name__}", saved)


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.dim() == 0 and not value.is_complex()
    return isinstance(value, Real) and not isinstance(value, bool)


def _refuse(place: str, wanted: str, got: Any) -> NoReturn:
    raise ValueError(f"{place} should be {wanted}; got {_short(got)}")


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, int) and value.bit_length() > 256:
        return f"a whole number of {value.bit_length():,} bits"
    text = repr(value) if isinstance(value, (int, float, str, bytes, type(None))) else f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:80]}..."
