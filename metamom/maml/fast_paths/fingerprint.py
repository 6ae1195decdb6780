"""Everything that decides how a meta-gradient is computed, apart from the values of tensors, found in one pass.

A step whose fingerprint is that of the step before it would pass the same checks, and run the same graph if compiled.
"""

from __future__ import annotations

from collections.abc import Hashable
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metamom.batch import TaskBatch
from metamom.common.modules import behaviour_of
from metamom.maml.checks.hooks import global_hooks
from metamom.maml.problem import PLAIN

_PLAIN = {nn.Parameter, Tensor}
_STRIDED = {torch.strided}
# these read a list of tensors without a Python loop
_FORM = attrgetter("shape", "dtype", "device", "requires_grad")
_LAYOUT, _IS_NESTED = attrgetter("layout"), attrgetter("is_nested")


class Fingerprint(NamedTuple):
    """How a step is computed.

    Attributes:
        key: equal for steps that are computed in the same way. Modules, modes, hooks and options; of each tensor its
            shape, strides, dtype and device; of parameters and buffers also their identity.
        tensors: these parameters and buffers. They stay alive, so that no new tensor gets the id of one of them.
    """

    key: tuple[Hashable, ...]
    tensors: list[Tensor]


def fingerprint_of_learner(learner: Any, batch: TaskBatch, workers: int) -> Fingerprint | None:
    """The fingerprint of a step of a `metamom.MAML`. Its options count as changed whenever an attribute is set.

    ``None`` where equal keys would not be enough, such as for learners with a state or rules of their own.
    """
    if learner.memory is not None or learner.annealing is not None or learner.norms_by_step is not None:
        return None
    if learner._rule() is not PLAIN or type(workers) is not int:
        return None
    step_sizes, looped = learner.step_sizes.fixed.values(), len(learner._vectorization.looped)
    return _fingerprint(learner, batch, workers, learner._changes, looped, *step_sizes)


def _fingerprint(owner: nn.Module, batch: TaskBatch, *options: Hashable) -> Fingerprint | None:
    if torch.is_inference_mode_enabled() or type(batch) is not TaskBatch:
        return None
    given = [x for x in batch if x is not None]
    found: list[Hashable] = [*options, global_hooks(), torch.is_anomaly_enabled(), *[x is None for x in batch]]
    held: list[Tensor | None] = []
    seen: set[int] = set()
    todo = [owner]
    while todo:
        module = todo.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        if type(module).named_parameters is not nn.Module.named_parameters:
            return None
        found += behaviour_of(module)
        if children := module._modules:
            found += children.keys()  # iterating over a scripted module's wrapper fails
            todo += [child for child in children.values() if child is not None]
        if parameters := module._parameters:
            found += parameters.keys()
            held += parameters.values()
        if buffers := module._buffers:
            found += buffers.keys()
            held += buffers.values()
    tensors = [x for x in held if x is not None]
    every = given + tensors
    if not _plain(every) or any(map(Tensor.is_inference, every)):
        return None
    found += map(id, held)
    found += map(_FORM, every)
    found += map(Tensor.stride, every)
    device = tensors[0].device.type if tensors else "cpu"
    found.append(torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None)
    return Fingerprint(tuple(found), tensors)


def _plain(tensors: list[Tensor]) -> bool:
    """Whether all are tensors with strides, of no class of their own."""
    return (
        _PLAIN.issuperset(map(type, tensors))
        and _STRIDED.issuperset(map(_LAYOUT, tensors))
        and not any(map(_IS_NESTED, tensors))
    )
