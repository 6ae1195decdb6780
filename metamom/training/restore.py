"""Load a checkpoint into the parts of a run: check everything first, then load all of it or nothing.

Files are checked when they are read (`metamom.training.checkpoints`). Here their contents are checked against the
run's parts: a part's current state is the schema.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from metamom.bias import BiasOperator
from metamom.bias.compose import Compose
from metamom.bias.draws import Draws
from metamom.bias.feedback import ErrorFeedback
from metamom.bias.marina import MARINA
from metamom.maml.learner import MAML
from metamom.optim import LambdaBeta
from metamom.training.alike import check_kind, refuse, short
from metamom.training.checkpoints import CheckpointError
from metamom.training.optimizer_state import check_loaded, check_optimizer, is_fixed
from metamom.training.schedule_state import check_rates, check_schedule, moved_by

# errors of `load_state_dict` in modules, optimizers, schedulers and operators for a state that does not fit
_MISFITS = (
    RuntimeError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, MemoryError,
)  # fmt: skip


class Generators(NamedTuple):
    """States of torch's global generators, for the CPU and each GPU."""

    cpu: Tensor
    cuda: list[Tensor]


def load_parts(
    parts: Mapping[str, Any],
    state: Mapping[str, Any],
    where: str,
    *,
    entries: int | None = None,
    workers: int | None = None,
    step: int = 0,
    calls: int | None = None,
    misfit: str = "belong to another model or optimizer",
) -> None:
    """Load each part's state. If one does not fit, all keep their previous state.

    Args:
        parts: the parts by name; each has ``state_dict`` and ``load_state_dict``.
        state: their states, with the same names.
        where: the origin of the state, for the error: "the checkpoints in RUN".
        entries: length of the gradients that bias operators keep.
        workers: n; each has a state of error feedback after the first step.
        step: number of completed steps; after one, an optimizer has a state.
        calls: the call count of random operators; any number if ``None``.
        misfit: the message for a state that does not fit.

    Raises:
        CheckpointError: naming the part, and what is wrong.
    """
    missing = [name for name in parts if name not in state]
    if missing:
        raise CheckpointError(f"there is no {', '.join(missing)} in {where}: another kind of run wrote it.")
    before = {name: copy.deepcopy(part.state_dict()) for name, part in parts.items()}
    schedules = [part for name, part in parts.items() if name.startswith("scheduler")]
    unknown = [None for name in state if str(name).startswith("scheduler") and name not in parts]
    moved = moved_by([*schedules, *unknown])
    name = ""
    try:
        for name, part in parts.items():
            if isinstance(part, Optimizer):
                check_optimizer(part, state[name], step=step, moved=moved, idle=_idle(parts.get("learner")))
            elif isinstance(part, (LRScheduler, LambdaBeta)):
                check_schedule(part, state[name], step=step)
            elif not isinstance(state[name], Mapping):
                raise ValueError(f"its state should be a dict; got {type(state[name]).__name__}")
            elif isinstance(part, nn.Module):
                _check_weights(part, state[name])
            part.load_state_dict(state[name])
            if isinstance(part, Optimizer) and is_fixed(part):
                check_loaded(before[name], part.state_dict(), moved=moved)
            elif isinstance(part, BiasOperator) and entries is not None:
                _check_operator(part, entries, workers if step else None, calls)
        if step:
            for name in [name for name, part in parts.items() if isinstance(part, Optimizer)]:
                check_rates(parts[name], schedules)
    except _MISFITS as error:
        for part_name, part in parts.items():
            part.load_state_dict(before[part_name])
        why = " ".join(str(error).split())
        kind = "" if isinstance(error, (ValueError, RuntimeError)) else f"{type(error).__name__}: "
        raise CheckpointError(f"{where} {misfit}: {name}: {kind}{why}") from error


def _idle(learner: Any) -> frozenset[int]:
    """The ids of a learner's trainable parameters that are no meta-parameters, and so never get a gradient."""
    if not isinstance(learner, MAML):
        return frozenset()
    moved = {id(p) for p in learner.meta_parameters().values()}
    return frozenset(id(p) for p in learner.parameters() if id(p) not in moved)


MOST = {"step": math.inf, "seconds": 2**53}  # the range in which a float is exact for integers


def checked_head(state: Mapping[str, Any], where: str) -> tuple[int, float]:
    """Check and return ``"step"`` and ``"seconds"`` of a checkpoint.

    Raises:
        CheckpointError: unless they are a whole number and a number, both >= 0.
    """
    for name, kinds in (("step", (int,)), ("seconds", (int, float))):
        value = state.get(name)
        if isinstance(value, bool) or not isinstance(value, kinds) or not 0 <= value < MOST[name]:
            kind = "a whole number" if kinds == (int,) else "a number"
            raise CheckpointError(f"{where} should hold {kind} >= 0 as {name!r}; got {short(value)}.")
    return state["step"], float(state["seconds"])


def checked_generators(state: Any, where: str) -> Generators:
    """Check and return the states of torch's generators. Each is tried on a temporary generator.

    Raises:
        CheckpointError: if they are not generator states.
    """
    if not isinstance(state, Mapping) or not isinstance(state.get("cpu"), Tensor):
        raise CheckpointError(
            f"{where} should hold the states of torch's generators as 'rng', a dict with a tensor 'cpu' and a list "
            f"'cuda'; got {short(state)}."
        )
    try:
        found = Generators(state["cpu"], list(state["cuda"]))
        torch.Generator().set_state(found.cpu)
        for number, each in enumerate(found.cuda):
            if not isinstance(each, Tensor) or each.dtype != torch.uint8:
                raise TypeError(f"the state of GPU {number} is not a tensor of bytes")
            if torch.cuda.is_available():
                torch.Generator(device="cuda").set_state(each)
    except _MISFITS as error:
        why = " ".join(str(error).split())
        raise CheckpointError(
            f"{where} hold no states of generators in 'rng': {type(error).__name__}: {why}"
        ) from error
    return found


def _check_operator(operator: BiasOperator, entries: int, workers: int | None, calls: int | None) -> None:
    """Refuse a state that an operator cannot have after steps with this many workers, or this many calls, if known."""
    state = operator.state_dict()
    _check_entries(state, entries, "its state", finite=operator.feeds_back)
    if operator.feeds_back and workers is not None:
        got = sorted(state["workers"])
        if got != list(range(workers)):
            kept = ", ".join(operator.names)
            raise ValueError(
                f"'workers' should hold the {kept} of each of {workers} workers, 0 to {workers - 1}; got those of "
                f"{', '.join(map(str, got[:20])) or 'none'}{', ...' * (len(got) > 20)}"
            )
    for member in _random(operator):
        if calls is not None and member.draw_step != calls:
            refuse("'calls'", f"{calls}, one for each step", member.draw_step)


def _random(operator: BiasOperator) -> Iterator[BiasOperator]:
    """The random operators inside an operator, which count calls. `train` makes one call a step."""
    if isinstance(operator, Draws):
        if operator.state_dict():  # otherwise it rounds without draws
            yield operator
    elif isinstance(operator, ErrorFeedback):
        if isinstance(operator, MARINA):
            yield operator
        yield from _random(operator.operator)
    elif isinstance(operator, Compose):
        for member in operator.operators:
            yield from _random(member)


def _check_entries(state: dict[str, Any], entries: int, place: str, *, finite: bool) -> None:
    """Check that all tensors that operators keep of workers' gradients are ``[d]`` or ``[n, d]``."""
    for name, value in state.items():
        if isinstance(value, dict):
            _check_entries(value, entries, f"{place}.{name}", finite=finite)
        elif isinstance(value, Tensor) and value.is_floating_point():
            if value.shape[-1:] != (entries,):
                refuse(f"{place}.{name}", f"a tensor of {entries} entries", value)
            if finite and not bool(value.isfinite().all()):
                raise ValueError(f"{place}.{name} is not finite in all of its entries")


def _check_weights(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Refuse weights that would be cast silently from another kind of number, or that are not finite."""
    parameters = dict(module.named_parameters())
    for name, mine in module.state_dict().items():
        saved = state.get(name)
        if isinstance(mine, Tensor) and isinstance(saved, Tensor):
            check_kind(mine, saved, name)
            if name in parameters and not bool(saved.isfinite().all()):
                raise ValueError(f"{name} is not finite in all of its entries, which no run saves")
