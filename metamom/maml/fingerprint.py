"""Everything that decides how a meta-gradient is computed, apart from the values of tensors, found in one pass.

A step whose fingerprint is that of the step before it would pass the same checks, and run the same graph if compiled.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metamom.batch import TaskBatch
from metamom.common.modules import behaviour_of, modules_of
from metamom.maml.hooks import global_hooks
from metamom.maml.problem import PLAIN

_PLAIN = (nn.Parameter, Tensor)


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
    found: list[Hashable] = [*options, global_hooks()]
    for x in batch:
        if x is None:
            found.append(None)
        elif type(x) is Tensor and _has_strides(x) and not x.is_inference():
            found += (x.shape, x.stride(), x.dtype, x.device)
        else:
            return None
    tensors: list[Tensor] = []
    for module in modules_of(owner):
        if type(module).named_parameters is not nn.Module.named_parameters:
            return None
        found += behaviour_of(module)
        if module._modules:
            found += module._modules.keys()
        for registered in (module._parameters, module._buffers):
            for name, x in registered.items():
                if x is not None:
                    if type(x) not in _PLAIN or not _has_strides(x):
                        return None
                    tensors.append(x)
                    found += (name, id(x), x.requires_grad, x.shape, x.stride(), x.dtype, x.device)
    device = tensors[0].device.type if tensors else "cpu"
    found.append(torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None)
    return Fingerprint(tuple(found), tensors)


def _has_strides(x: Tensor) -> bool:
    return x.layout is torch.strided and not x.is_nested
