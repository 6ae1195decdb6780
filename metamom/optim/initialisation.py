"""The step by which torch makes an optimizer's state exist before the first real step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from metamom.common.sharded import local_part


def only_makes_state(state: Mapping[Tensor, Any], groups: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a step only serves to make the state: there is none yet, and all step sizes and gradients are zero.

    `torch.distributed.checkpoint.state_dict` takes such a step before it reads or writes the state of a new optimizer.
    Counted as the first step, it would make zero the first gradient, or leave weight decay in the momentum.

    Args:
        state: of an optimizer.
        groups: its parameter groups.
    """
    if state or torch.compiler.is_compiling() or any(_number(group["lr"]) != 0 for group in groups):
        return False
    grads = [p.grad for group in groups for p in group["params"] if p.grad is not None]
    return bool(grads) and not any(_has_entries(g) for g in grads)


def without_a_gradient(state: Mapping[Tensor, Any]) -> set[Tensor]:
    """The parameters of a loaded state if it is from before the first gradient: all of its momenta are zero.

    Of sharded momenta, each process looks at its own entries: copying an optimizer on one process must not wait for
    the others.
    """
    momenta = {p: each["momentum"] for p, each in state.items() if isinstance(each, dict) and "momentum" in each}
    if any(v.is_meta or bool(local_part(v).count_nonzero()) for v in momenta.values()):
        return set()
    return set(momenta)


def _number(lr: float | Tensor) -> float:
    return float(lr.detach()) if isinstance(lr, Tensor) else lr


def _has_entries(grad: Tensor) -> bool:
    if grad.is_meta or grad.is_sparse:
        return True
    return bool(local_part(grad).count_nonzero())
