"""The momentum at beta = 1: v_k is the gradient itself, kept for a later beta, and not copied where that is safe."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor

from metamom.optim.update import momentum_updates_

LARGE = 2**12  # entries from which sharing a tensor's memory takes less time than copying it


def keep_last_gradients(
    state: MutableMapping[Tensor, Any], params: list[Tensor], grads: list[Tensor], *, own: bool
) -> None:
    """Set every parameter's ``"momentum"`` to its gradient.

    A copy would cost as much as the step of SGD itself. So the momentum shares the memory of a large gradient, which
    torch copies if and when somebody writes to one of the two. Most gradients are dropped by the next `zero_grad`.

    Args:
        state: the optimizer's.
        params, grads: w and the gradients.
        own: whether the gradients are new tensors, which nobody else has.
    """
    bufs, copied = [], []
    for p, g in zip(params, grads, strict=True):
        mine = state[p]
        if own and type(g) is Tensor and g.dtype == p.dtype:
            mine["momentum"] = g
        elif g.numel() >= LARGE and _can_be_shared(g, p):
            mine["momentum"] = torch._lazy_clone(g)
        else:
            if "momentum" not in mine:
                mine["momentum"] = torch.empty_like(p)
            bufs.append(mine["momentum"])
            copied.append(g)
    momentum_updates_(bufs, copied, 1.0)


def _can_be_shared(g: Tensor, p: Tensor) -> bool:
    """Whether torch sees every write to this memory, and there will probably be none.

    A gradient that has been written to since it was made will be again, by ``zero_grad(set_to_none=False)`` or another
    backward pass. The late copy costs more than one in time, since it needs new memory.
    """
    if type(g) is not Tensor or not g.is_cpu or g.dtype != p.dtype or g.is_inference() or g._version or g._is_view():
        return False
    memory = g.untyped_storage()
    # what NumPy or other processes reach is not resizable, or shared: torch would not see their writes
    return memory.nbytes() == g.numel() * g.element_size() and memory.resizable() and not memory.is_shared()
